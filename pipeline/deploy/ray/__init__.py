"""The servers of a file on a cluster, by Ray Serve.

`config` makes Serve's configuration and `rayservice` KubeRay's resource, both without effects;
`cluster` talks to a cluster's dashboard, `nodes` holds what servers need against what nodes have,
`local` runs a Ray on this machine. What runs inside Ray is loaded there alone: nothing else here
imports it.

    app            what Serve's configuration names: an application for each server, and the gateway
    ingress        the gateway, as Serve's ingress
    view           the servers, in the state that Serve tells
    leases         its requests: each gets a lease of a replica
    prefix_router  which replica: the one that has the conversation's prompt (prefix)
    connection     a client's connection, as Serve passes it on
    replica        one server on one node
    relay          lets requests with a lease through to it
    local_server   the server itself: `up` in a process of its own
    vllm_in_group  vLLM's server, where its model is divided among nodes
"""
