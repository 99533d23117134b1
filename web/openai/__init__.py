"""The routes of the OpenAI API. Each request becomes jobs, and the output of the jobs becomes OpenAI's format."""
