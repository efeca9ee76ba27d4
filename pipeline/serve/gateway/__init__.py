"""One address for all servers of a configuration, for clients of three APIs: OpenAI's, Anthropic's
and Ollama's.

app           the routes, what the gateway answers itself, and its process
settings      its settings, and the gateway as one more instance of the supervisor
servers       the servers and their states, and which of them a request is meant for
remote        the same for servers that run elsewhere, which a file lists
peers         what several gateways of the same servers count together
guard         who may ask: keys, origins, host names
connection    a client's connection
request_body  the model that a request names
proxy         a request held, forwarded, and its answer streamed back
demand        what the supervisor is told of requests: which servers they use, and wait for
upstream      one request to one server; what servers say of themselves
answers       errors and lists in the form of either API
counters      what is counted, for /metrics and the dashboard
dashboard     the page that shows them
ollama        Ollama's API, translated
loading       what is loaded, and how clients change that
page          llama.cpp's web page, and what it asks for
other_engines the same servers behind LiteLLM's proxy, or llama-server's own router
"""

from pipeline.core.lazy import load_modules_when_used

load_modules_when_used(__name__)
