"""The kernel that API and worker share: job record, phases, store, queue. No web framework, no torch."""
