"""One address for all instances of a configuration, for OpenAI's and Anthropic's clients.

settings    what is asked of it, and the gateway as one more instance of the supervisor
fleet       which instances there are and how they are, read from the configuration's folder
routing     which of them a request means
asking      the model that a request names
proxy       a request held, sent on, and its answer passed back as it comes
upstream    one request to one instance
page        llama.cpp's own page, and what it asks for
app         the paths, and what the gateway answers itself
"""
