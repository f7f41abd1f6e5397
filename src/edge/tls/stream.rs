//! One connection's TLS, in buffers of our own: rustls holds no byte that is not counted here.
//!
//! rustls' other interface keeps what it has read, a record or a handshake message that is not whole, in
//! a buffer whose size cannot be asked for, and which does not shrink. Here such bytes are
//! [`Stream::held`] and bounded by [`INPUT_MAX`], in the handshake and after it.

use std::sync::Arc;

use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{Error, HandshakeKind, ServerConfig};

/// What rustls itself needs for a connection, as measured: 3.2 MB for 900.
pub const STATE_HELD: usize = 4 * 1024;

/// The largest record there is: 16 KiB, what TLS 1.2 may add to it, and its head. A handshake message
/// that does not fit is refused: a client's longest, its certificates, may have 8 KiB.
const INPUT_MAX: usize = 16 * 1024 + 2048 + 5;

/// What encryption adds to a record of application data, with room to spare.
const OVERHEAD: usize = 64;
/// What such a record holds.
pub const RECORD: usize = 16 * 1024;

type Traffic<'a> = WriteTraffic<'a, ServerConnectionData>;

/// The TLS of one connection. What it has to say to the client is not kept here.
pub struct Stream {
    connection: UnbufferedServerConnection,
    /// The start of a record, or of a handshake message, that is not whole yet.
    input: Vec<u8>,
    /// The client has said that it will send no more.
    ended: bool,
    /// After an error rustls must not be asked for anything.
    failed: bool,
}

impl Stream {
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Stream { connection, input: Vec::new(), ended: false, failed: false })
    }

    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// The server's key has signed, as far as it will: what is left of the handshake is cheap.
    pub fn has_signed(&self) -> bool {
        // After a HelloRetryRequest this never tells whether it has signed: that counts as not signed.
        matches!(
            self.connection.handshake_kind(),
            Some(HandshakeKind::Full | HandshakeKind::Resumed)
        )
    }

    /// The certificate whose key the client holds, in DER.
    pub fn client_certificate(&self) -> Option<&[u8]> {
        Some(self.connection.peer_certificates()?.first()?.as_ref())
    }

    /// Bytes of memory held, the client's certificates included, which rustls keeps.
    pub fn held(&self) -> usize {
        let certificates = self.connection.peer_certificates().unwrap_or_default();
        let certificates: usize = certificates.iter().map(|der| der.len()).sum();
        STATE_HELD + certificates + self.unread()
    }

    /// Of these, what the client has sent of a record or message that is not whole.
    pub fn unread(&self) -> usize {
        self.input.capacity()
    }

    /// How much it takes from the socket at once.
    pub fn takes(&self) -> usize {
        if self.is_handshaking() { INPUT_MAX.saturating_sub(self.input.len()) } else { usize::MAX }
    }

    /// Keeps bytes from the socket for [`Stream::advance`].
    pub fn put(&mut self, bytes: &[u8]) {
        self.input.reserve_exact(bytes.len());
        self.input.extend_from_slice(bytes);
    }

    /// Goes on with what was [`put`](Stream::put), and appends what it says to `plain`. Returns whether
    /// the client will send no more. The alert that tells it of an error is in the output.
    pub fn advance(&mut self, plain: &mut Vec<u8>, output: &mut Vec<u8>) -> Result<bool, Error> {
        let mut input = std::mem::take(&mut self.input);
        let (used, outcome) = process(&mut self.connection, &mut input, output, plain);
        input.drain(..used);
        input.shrink_to_fit();
        self.input = input;
        self.failed = outcome.is_err();
        self.ended |= outcome?;
        if self.input.len() >= INPUT_MAX {
            return Err(Error::General("a handshake message is too large".into()));
        }
        Ok(self.ended)
    }

    /// Encrypts `plain`, which is [`RECORD`] bytes at most.
    pub fn encrypt(&mut self, plain: &[u8]) -> Result<Vec<u8>, Error> {
        self.written(plain.len() + OVERHEAD, |traffic, space| traffic.encrypt(plain, space))
    }

    /// What tells the client that no more will come. Within a handshake there is nothing to tell.
    pub fn close(&mut self) -> Vec<u8> {
        let told = self.written(OVERHEAD, |traffic, space| traffic.queue_close_notify(space));
        told.unwrap_or_default()
    }

    /// What `write` writes into `most` bytes.
    fn written(
        &mut self,
        most: usize,
        write: impl FnOnce(&mut Traffic<'_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<Vec<u8>, Error> {
        if self.failed {
            return Err(Error::HandshakeNotComplete);
        }
        let mut output = Vec::new();
        loop {
            match self.connection.process_tls_records(&mut self.input).state? {
                // New keys, which rustls may ask for after very many records.
                ConnectionState::EncodeTlsData(mut data) => encode(&mut data, &mut output),
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::WriteTraffic(mut traffic) => {
                    let start = output.len();
                    output.resize(start + most, 0);
                    let space = output.get_mut(start..).unwrap_or_default();
                    let written = write(&mut traffic, space);
                    output.truncate(start + *written.as_ref().unwrap_or(&0));
                    return written.map(|_| output).map_err(|e| Error::General(e.to_string()));
                }
                _ => return Err(Error::HandshakeNotComplete),
            }
        }
    }
}

/// Has rustls read `input` as far as it goes. Returns how many bytes it is done with, and whether
/// the client has said that it will send no more.
fn process(
    connection: &mut UnbufferedServerConnection,
    input: &mut [u8],
    output: &mut Vec<u8>,
    plain: &mut Vec<u8>,
) -> (usize, Result<bool, Error>) {
    let (mut used, mut ended) = (0, false);
    loop {
        let rest = input.get_mut(used..).unwrap_or_default();
        let UnbufferedStatus { discard, state } = connection.process_tls_records(rest);
        used += discard;
        match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(Ok(record)) = traffic.next_record() {
                    plain.extend_from_slice(record.payload);
                    used += record.discard;
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, output),
            Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
            Ok(ConnectionState::PeerClosed) => ended = true,
            Ok(_) => return (used, Ok(ended)),
            Err(error) => {
                let rest = input.get_mut(used..).unwrap_or_default();
                alert(connection, rest, output);
                return (used, Err(error));
            }
        }
    }
}

/// After an error, what is to be told to the client, and no more: rustls must not read on.
fn alert(connection: &mut UnbufferedServerConnection, rest: &mut [u8], output: &mut Vec<u8>) {
    while connection.wants_write()
        && let Ok(ConnectionState::EncodeTlsData(mut data)) =
            connection.process_tls_records(rest).state
    {
        encode(&mut data, output);
    }
}

fn encode(data: &mut EncodeTlsData<'_, ServerConnectionData>, output: &mut Vec<u8>) {
    // It says how much room it needs when it gets none.
    let Err(EncodeError::InsufficientSize(needs)) = data.encode(&mut []) else { return };
    let start = output.len();
    output.resize(start + needs.required_size, 0);
    let space = output.get_mut(start..).unwrap_or_default();
    let written = data.encode(space).unwrap_or(0);
    output.truncate(start + written);
}
