"""Part of a stand-in for VLMEvalKit: see run.py."""
