//! STARTTLS to a server without TLS: an error, never ACK, and the session goes on in plain text. What is pipelined after
//! it is judged as what it is; none of it may pass for something said under TLS (NBD proto.md, "NOTLS mode").

use anyhow::ensure;
use spline_conformance::raw::{Raw, info_data, opt, option, rep};
use spline_conformance::stage::play;

/// A TLS record that a client sends first: handshake, version 1.0, a ClientHello.
const CLIENT_HELLO: [u8; 11] = [0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3];

#[test]
fn plain_text_behind_it_is_plain_text() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        let go = option(opt::GO, &info_data(stage.name(), &[]));
        let pipelined = [option(opt::STARTTLS, &[]), option(opt::LIST, &[]), go];
        raw.send(&pipelined.concat())?;
        raw.expect_replies(opt::STARTTLS, &[rep::ERR_UNSUP])?;
        raw.expect_replies(opt::LIST, &[rep::SERVER, rep::ACK])?;
        raw.expect_replies(opt::GO, &[rep::INFO, rep::ACK])?;
        raw.read(0, 512).map(drop)
    })
}

#[test]
fn a_client_that_starts_tls_regardless_is_closed() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        raw.send(&[&option(opt::STARTTLS, &[])[..], &CLIENT_HELLO, &[0; 200]].concat())?;
        raw.expect_replies(opt::STARTTLS, &[rep::ERR_UNSUP])?;
        raw.closed()
    })
}

#[test]
fn repeated_or_with_data_it_stays_an_error() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        for data in [&b""[..], b"x", &CLIENT_HELLO, b""] {
            let replies = raw.expect(opt::STARTTLS, data, &[rep::ERR_UNSUP])?;
            ensure!(replies[0].data.is_ascii(), "the error's text is one for people: {replies:?}");
        }
        raw.go(stage.name(), &[]).map(drop)
    })
}
