"""Sweeps: many runs of one config, each with other values of some fields, that share a budget of workers.

Ray Tune decides which values are tried and which trials go on; each trial is an ordinary elastic run of its own.
`space` and `share` are pure; `record` is what a sweep is resumed from; `trial` is the process of one trial, `launch`
looks after it; `tuning`, `choosing`, `watch`, `shares` and `actor` are the adapter to Ray Tune.
"""
