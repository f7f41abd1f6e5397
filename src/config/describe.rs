//! The effective configuration as text, for `check-config`: what counts, not what was typed.

use std::fmt::Display;
use std::path::PathBuf;

use super::variables::{self as var, Variable};
use super::{Config, Http, Log, LogFormat, OutageRedeem, Redis, Reenroll};

impl Config {
    /// One line `NAME=value` for each setting; of a secret only whether it is set. Without Redis
    /// (switched off, or no host named) `REDIS_ENABLED=false` is the only line about it.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = self.http.describe();
        lines.extend(self.log.describe());
        lines.extend(self.describe_ca());
        lines.extend(self.describe_tokens());
        match &self.redis {
            Some(redis) => lines.extend(redis.describe()),
            None => lines.push(line(&var::REDIS_ENABLED, false)),
        }
        lines
    }

    fn describe_ca(&self) -> Vec<String> {
        vec![
            line(&var::DATA_DIR, self.data_dir.display()),
            line(&var::CA_STORAGE_PATH, self.ca.dir.display()),
            line(&var::ROOT_CA_VALIDITY_YEARS, self.ca.root_validity_years),
            line(&var::DEVICE_CERT_VALIDITY_DAYS, self.ca.device_validity_days),
            line(&var::CRL_HOOK, path(self.crl_hook.as_ref())),
        ]
    }

    fn describe_tokens(&self) -> Vec<String> {
        let reenroll = match self.reenroll {
            Reenroll::Deny => "deny",
            Reenroll::Allow => "allow",
        };
        let outage_redeem = match self.outage_redeem {
            OutageRedeem::Own => "own",
            OutageRedeem::None => "none",
        };
        vec![
            line(&var::PROVISIONING_TOKEN_TTL, self.token_ttl_s),
            line(&var::JWT_SECRET, secret(self.jwt_secret.is_some())),
            line(&var::ONBOARDING_API_KEY, secret(self.onboarding_api_key.is_some())),
            line(&var::ADMIN_API_KEY, secret(self.admin_api_key.is_some())),
            line(&var::REENROLL, reenroll),
            line(&var::RENEW_REVOKES, self.renew_revokes),
            line(&var::RENEW_AFTER_EXPIRY_DAYS, self.renew_after_expiry_days),
            line(&var::OUTAGE_REDEEM, outage_redeem),
            line(&var::MEMORY_MAX_TOKENS, self.memory_max_tokens),
        ]
    }
}

impl Http {
    fn describe(&self) -> Vec<String> {
        let proxies: Vec<_> = self.trusted_proxies.iter().map(ToString::to_string).collect();
        vec![
            line(&var::HTTP_HOST, self.host),
            line(&var::PORT, self.port),
            line(&var::TLS_CERT, path(self.tls.as_ref().map(|tls| &tls.cert))),
            line(&var::TLS_KEY, path(self.tls.as_ref().map(|tls| &tls.key))),
            line(&var::WORKERS, self.workers),
            line(&var::MAX_CONNECTIONS, self.max_connections),
            line(&var::MAX_CONNECTIONS_PER_IP, self.max_connections_per_ip),
            line(&var::MAX_BUFFER_BYTES, self.max_buffer_bytes),
            line(&var::KEEP_ALIVE_SECONDS, self.keep_alive.as_secs()),
            line(&var::TLS_HANDSHAKE_SECONDS, self.tls_handshake.as_secs()),
            line(&var::TRUSTED_PROXIES, or_unset(&proxies.join(","))),
            line(&var::ONBOARDING_RATE_LIMIT, self.onboarding_rate_limit),
        ]
    }
}

impl Log {
    fn describe(&self) -> Vec<String> {
        let format = match self.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        vec![
            line(&var::LOG_LEVEL, self.level.as_str().to_ascii_lowercase()),
            line(&var::RUST_LOG, or_unset(self.filter.as_deref().unwrap_or_default())),
            line(&var::LOG_FORMAT, format),
        ]
    }
}

impl Redis {
    fn describe(&self) -> Vec<String> {
        let username = self.username.as_deref().unwrap_or(var::REDIS_USERNAME.default);
        vec![
            line(&var::REDIS_ENABLED, true),
            line(&var::REDIS_HOST, &self.host),
            line(&var::REDIS_PORT, self.port),
            line(&var::REDIS_USERNAME, username),
            line(&var::REDIS_PASSWORD, secret(self.password.is_some())),
            line(&var::REDIS_DB, self.db),
            line(&var::REDIS_TLS, self.tls),
            line(&var::REDIS_TLS_CA, path(self.tls_ca.as_ref().map(|ca| &ca.path))),
            line(
                &var::REDIS_TLS_SERVER_NAME,
                or_unset(self.tls_server_name.as_deref().unwrap_or_default()),
            ),
            line(&var::REDIS_REQUIRED, self.required),
            line(&var::REDIS_KEY_PREFIX, &self.key_prefix),
            line(&var::REDIS_TIMEOUT_MS, self.timeout.as_millis()),
            line(&var::REDIS_CONNECT_TIMEOUT_MS, self.connect_timeout.as_millis()),
            line(&var::REDIS_POOL_SIZE, self.pool_size),
        ]
    }
}

/// Control characters are escaped: a value cannot pass for a line of its own.
fn line(variable: &Variable, value: impl Display) -> String {
    let value: String = value
        .to_string()
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect();
    format!("{}={value}", variable.name)
}

fn secret(is_set: bool) -> &'static str {
    if is_set { "(set)" } else { "(unset)" }
}

fn path(path: Option<&PathBuf>) -> String {
    or_unset(&path.map(|path| path.display().to_string()).unwrap_or_default()).to_owned()
}

fn or_unset(text: &str) -> &str {
    if text.is_empty() { "(unset)" } else { text }
}
