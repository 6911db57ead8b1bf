//! placeholder
use crate::Context;
pub(crate) fn start(context: Context, _kinds: crate::discovery::Kinds) -> impl Future<Output = ()> + Send + 'static { async move { context.shutdown.cancelled().await } }
