//! Cluster DNS: answers, forwarding, cache and sockets.
