//! Namespaces, links, routes, sysctls and sockets: the Linux parts that other crates share.
