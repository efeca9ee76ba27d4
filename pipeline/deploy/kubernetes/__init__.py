"""Manifests for the instances of a configuration. Everything but `folder` is pure.

`drafts` makes an instance fit a pod, `objects` and `pod` describe it, `folder` writes it down.
"""
