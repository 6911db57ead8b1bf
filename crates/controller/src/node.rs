//! placeholder
use crate::Context;
pub(crate) fn start_lifecycle(context: Context) -> impl Future<Output = ()> + Send + 'static { async move { context.shutdown.cancelled().await } }
pub(crate) fn start_pod_gc(context: Context) -> impl Future<Output = ()> + Send + 'static { async move { context.shutdown.cancelled().await } }
