"""A name that our guards replace: see run.py."""


def mcq_vanilla_eval(model, data, meta, nproc, result_file, dataset_name=None): ...
