"How well a policy would do, from what another one did, and how far to trust it."
