//! Load balancers: the service controller and its providers.
