"""What a run will take, before anything is reserved: memory of every device, time of every stage, and the
schedule over many devices as a simulation.

Arithmetic on a configuration, the shapes of models and the data sheets of devices: no torch, no Ray, no
network. docs/planning.md says how far the figures are from what was measured.
"""
