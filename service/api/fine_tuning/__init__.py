"""Fine-tuning jobs: requests, their resolution into a RunConfig, and how a job is shown."""
