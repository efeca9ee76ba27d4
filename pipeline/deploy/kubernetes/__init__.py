"""Manifests for the instances of a configuration. Everything but `folder` is pure.

`workload` adapts an instance to a pod, `manifests` describes its objects, `gateway` those of the
gateway before all of them, `options` are the variables of `kubernetes`, `folder` writes the files.
"""
