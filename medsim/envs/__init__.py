"Treatment as an environment: what is decided, when, and what is seen of the patient."
