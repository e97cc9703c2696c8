"""The daemon's own scheduler in virtual time: what a workload would see, and how policies compare.

`workload` says who asks for what, `traces` and `records` make workloads, `machine` plays
the box that serves them, `contenders` are the schedulers compared, `figures` measures,
`compare` runs them all, and `report` and `plot` show what came out.
"""
