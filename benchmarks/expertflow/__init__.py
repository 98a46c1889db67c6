"""ExpertFlow's claims, one by one, beside what is built here: the numbers of docs/expertflow.md.

``docs/expertflow/run.sh OUT`` runs it all. Every part is a module that knows how to make its rows
(:mod:`hits`, :mod:`speeds`, :mod:`scheduling`, :mod:`recall`; the gap is
``benchmarks/expertflow_gaps.py``); rows go to OUT as JSON, and from there alone come the tables
(:mod:`tables`, :mod:`verdicts`), the figures (:mod:`figures`) and the page (:mod:`page`). Only
:mod:`recall` knows torch.
"""
