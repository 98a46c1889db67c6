"""Measures a machine into a hardware profile: what :mod:`policies.hardware` reads.

Each module measures one subject and knows nothing of the others; :mod:`.run` calls them in
order, :mod:`.fits` has the arithmetic without a clock, :mod:`.sources` says where each figure
comes from, :mod:`.toml` writes the file.
"""
