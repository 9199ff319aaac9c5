"""What the person sees, and what a run leaves on disk.

`run_folder` and `metrics_log` write a run's folder, `lineage` its samples. `progress` shows it as it goes on;
`capture` keeps the terminal for it. `evaluation` compares start and end; `summary` prints that.
"""
