"""/v1/webhook_endpoints: who is told of the end of a job."""
