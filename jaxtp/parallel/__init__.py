"""Work spread over mesh axes that the model knows nothing of: pipelines."""
