"""The differential fuzzer: random programs of ioctls, run on the model and on a real kernel, compared call by call.

`program` is what a program is, `generator` makes them, `executor` runs them (also inside a bare guest), `target` is
where they run, `compare` and `shrink` deal with differences, `vectors` keeps answers of a real kernel, `cli` is the
command. See docs/fuzz.md.
"""
