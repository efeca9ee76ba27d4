"""Manifests for the instances of a configuration. Everything but `folder` is pure.

`specs` adapts an instance to a pod, `workload` describes it, `objects` and `pod` are its manifests,
`options` the variables of `kubernetes`, `folder` writes the files.
"""
