"""`xeray cluster`: one Ray over several workstations, and everything that can start a node of it.

::

    inventory.yaml ── inventory ──► NodeSpec ──► node        on the machine: start, stop, drain
                                       │  └────► bring_up    over SSH: up, status, down, exec
                                       └───────► render      systemd, ray up, Docker, Kubernetes
"""
