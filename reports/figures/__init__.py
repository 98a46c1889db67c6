"""Figures, one per file: plain data in, a matplotlib Figure out.

No figure touches pyplot or any other global state. Fills differ in luminance and hatch, lines
in luminance, marker and dash, so that they survive greyscale; legends lie outside the axes.
"""
