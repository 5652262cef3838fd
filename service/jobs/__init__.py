"""The kernel that API and worker share: job record, phases, store, queue. No web framework, no torch.

phases, tables, ids    what there is                 store           everything about jobs, re-exported: see its table
database, migrations   where it is kept              files, uploads  records of bytes that the API stores
queue                  wake-ups over Celery          models, keys    names of models; API keys
"""
