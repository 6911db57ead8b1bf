//! ServiceAccount tokens: JSON Web Tokens signed with ES256, bound to objects that must still exist when they are used.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portolan_api::meta;
use serde_json::{Value, json};

use crate::auth::User;
use crate::config::Error;
use crate::store::{Key, Snapshot};

/// Issuer and default audience of tokens.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Shortest lifetime a TokenRequest may ask for, in seconds (authentication/v1 TokenRequestSpec).
pub const MIN_SECONDS: i64 = 600;

/// Lifetime if a TokenRequest does not say.
pub const DEFAULT_SECONDS: i64 = 3600;

/// Longest lifetime: one year, so that a typing error does not make a token for ever.
pub const MAX_SECONDS: i64 = 365 * 86_400;

/// An object a token depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// `Pod`, `Secret` or `Node`.
    pub kind: String,
    /// Name.
    pub name: String,
    /// uid.
    pub uid: String,
}

/// Makes and checks tokens.
pub struct Tokens {
    key: EcdsaKeyPair,
    issuer: String,
}

impl Tokens {
    /// Uses a PKCS #8 key.
    pub fn new(pkcs8: &[u8]) -> Result<Tokens, Error> {
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8)
            .map_err(|error| Error::Certificates(format!("the key of service account tokens: {error}")))?;
        Ok(Tokens { key, issuer: ISSUER.to_owned() })
    }

    /// The audience of tokens for the API server itself.
    pub fn audience(&self) -> &str {
        &self.issuer
    }

    /// A token for a ServiceAccount; times in seconds since the epoch.
    pub fn issue(
        &self,
        account: &Value,
        audiences: &[String],
        bound: Option<&Bound>,
        now: i64,
        seconds: i64,
    ) -> Result<String, portolan_api::status::Status> {
        let (namespace, name) = (meta::namespace(account), meta::name(account));
        let mut extra = json!({
            "namespace": namespace,
            "serviceaccount": {"name": name, "uid": meta::uid(account)},
        });
        if let Some(bound) = bound {
            extra[bound.kind.to_lowercase()] = json!({"name": bound.name, "uid": bound.uid});
        }
        let claims = json!({
            "iss": self.issuer,
            "aud": audiences,
            "sub": format!("system:serviceaccount:{namespace}:{name}"),
            "iat": now,
            "nbf": now,
            "exp": now + seconds,
            "jti": uuid::Uuid::new_v4().to_string(),
            "kubernetes.io": extra,
        });
        let header = json!({"alg": "ES256", "typ": "JWT"});
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()));
        let signature = self
            .key
            .sign(&SystemRandom::new(), signed.as_bytes())
            .map_err(|_| portolan_api::status::Status::internal("the token cannot be signed"))?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())))
    }

    /// The user behind a token, if it is ours, in time, for one of `audiences` (the API server's own if there are
    /// none), and the ServiceAccount and bound object still exist. Also returns the audiences it is good for.
    pub fn authenticate(
        &self,
        token: &str,
        audiences: &[String],
        state: &Snapshot,
        now: i64,
    ) -> Option<(User, Vec<String>)> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        if header["alg"] != "ES256" {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .ok()?;
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        if claims["iss"] != self.issuer.as_str()
            || claims["exp"].as_i64()? <= now
            || claims["nbf"].as_i64().is_some_and(|from| from > now + 60)
        {
            return None;
        }
        let own = [self.issuer.clone()];
        let accepted = if audiences.is_empty() { own.as_slice() } else { audiences };
        let good_for: Vec<String> = meta::list(&claims, &["aud"])
            .iter()
            .filter_map(|audience| audience.as_str())
            .filter(|audience| accepted.iter().any(|a| a == audience))
            .map(str::to_owned)
            .collect();
        if good_for.is_empty() {
            return None;
        }
        let extra = &claims["kubernetes.io"];
        let namespace = extra["namespace"].as_str()?;
        let account = extra["serviceaccount"]["name"].as_str()?;
        let live = |resource: &str, namespace: &str, claim: &Value| -> Option<bool> {
            let key = Key::new(namespace, claim["name"].as_str()?);
            let object = state.get(resource, &key)?;
            Some(meta::uid(&object.value) == claim["uid"].as_str()?)
        };
        if !live("serviceaccounts", namespace, &extra["serviceaccount"])? {
            return None;
        }
        let mut user = User::service_account(namespace, account);
        user.uid = extra["serviceaccount"]["uid"].as_str().unwrap_or_default().to_owned();
        for (claim, resource, scope) in
            [("pod", "pods", namespace), ("secret", "secrets", namespace), ("node", "nodes", "")]
        {
            let bound = &extra[claim];
            if bound.is_null() {
                continue;
            }
            if !live(resource, scope, bound)? {
                return None;
            }
            for (field, suffix) in [("name", "name"), ("uid", "uid")] {
                let key = format!("authentication.kubernetes.io/{claim}-{suffix}");
                user.extra.insert(key, vec![bound[field].as_str().unwrap_or_default().to_owned()]);
            }
        }
        if let Some(id) = claims["jti"].as_str() {
            user.extra.insert("authentication.kubernetes.io/credential-id".to_owned(), vec![format!("JTI={id}")]);
        }
        Some((user, good_for))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[tokio::test]
    async fn tokens_live_as_long_as_what_they_are_bound_to() {
        let tokens = Tokens::new(&crate::pki::token_key(None).expect("key")).expect("usable");
        let store = Store::in_memory();
        let account = json!({"metadata": {"namespace": "a", "name": "sa", "uid": "u1"}});
        let pod = json!({"metadata": {"namespace": "a", "name": "p", "uid": "u2"}});
        store
            .transact(|txn| {
                txn.put("serviceaccounts", &Key::new("a", "sa"), account.clone());
                txn.put("pods", &Key::new("a", "p"), pod.clone());
                Ok(())
            })
            .await
            .expect("stored");
        let bound = Bound { kind: "Pod".into(), name: "p".into(), uid: "u2".into() };
        let own = vec![tokens.audience().to_owned()];
        let token = tokens.issue(&account, &own, Some(&bound), 1000, 600).expect("token");
        let check = |token: &str, audiences: &[String], now: i64| {
            tokens.authenticate(token, audiences, &store.snapshot(), now).map(|(user, _)| user.name)
        };
        assert_eq!(check(&token, &[], 1001).as_deref(), Some("system:serviceaccount:a:sa"));
        assert_eq!(check(&token, &[], 1600), None, "expired");
        assert_eq!(check(&token, &["other".to_owned()], 1001), None, "another audience");
        let mut forged = token.clone();
        forged.replace_range(0..1, "f");
        assert_eq!(check(&forged, &[], 1001), None, "forged");
        store
            .transact(|txn| {
                txn.delete("pods", &Key::new("a", "p"));
                Ok(())
            })
            .await
            .expect("deleted");
        assert_eq!(check(&token, &[], 1001), None, "the pod is gone");
    }
}
