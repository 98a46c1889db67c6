"""The simulated world: SimPy charges time for what the planner decides.

Knows simpy, numpy, policies and traces; never imports torch.
"""
