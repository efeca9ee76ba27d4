"""What keeps pages elsewhere from using the servers of this machine.

rules     which requests are refused
refusal   the answers to them, in the form of either API
request   the heads and chunks of requests, read strictly and written anew
relay     connections, passed on to a server once the heads of their requests were checked
port      a server's host and port, listened on in its place
"""
