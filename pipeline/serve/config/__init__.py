"""What a file of instances or a profile asks for, read, checked, and turned into instances.

`toml_form.load` and `profiles.load_profile` read; `instances.check` and `instances.instances` turn
what was read into command lines and environments.
"""
