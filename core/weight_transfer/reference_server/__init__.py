"""The reference inference worker, ``weight-transfer serve``: a causal language model of transformers behind HTTP.

It generates with transformers' continuous batching, answers in OpenAI's format, and receives its weights meanwhile.
Read in this order: `hosted` (the model), `drawing` and `batching` (who generates), `wishes` (what a request asks for),
`logprobs` and `answers` (what it gets), `routes`, `metrics` and `worker`.
"""
