//! The certificate authority.

pub mod csr;
mod key;
#[cfg(test)]
mod openssl;
mod pem;
