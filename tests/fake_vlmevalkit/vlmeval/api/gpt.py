"""Part of a stand-in for VLMEvalKit: see run.py."""

from types import SimpleNamespace

requests = SimpleNamespace(post=None)
