"""One update after another: the trainer's session, and the worker's.

It may import all other folders but those that test, show and are run: `control`, `plugins`, `memory`, `plan`, `model`,
`config` and `values`.
"""
