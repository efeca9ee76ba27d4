"""Ollama's API, for clients that speak nothing else.

endpoints  the routes: what is answered here, what an instance answers, what is refused
requests   Ollama's requests as requests for an instance
replies    an instance's answers as Ollama's
exchange   one request through the proxy, its body and its answer translated
pull       models that clients have prepared
models     what is known of the models: their files' headers, sizes and digests
"""
