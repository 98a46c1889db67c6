"""What results mean: summaries, figures, one HTML page, timelines.

Everything here reads a :class:`policies.result.Result` and perhaps a
:class:`policies.recording.Recording`; nothing here runs a trace. Matplotlib and jinja2 are
imported only by the modules that draw and that write the page.
"""
