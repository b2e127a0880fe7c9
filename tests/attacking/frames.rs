//! Just enough HTTP/2 to say what no library lets one say: every header literal, nothing checked.

use std::io::{Read, Write};

use super::Entry;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// A request as a list of fields, and what follows its head.
#[derive(Clone)]
pub(super) struct Request {
    pub(super) fields: Vec<(&'static str, String)>,
    pub(super) body: &'static str,
    pub(super) trailers: Vec<(&'static str, &'static str)>,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A status, as its index in the static table: 0x88 is 200, 0x8c is 400.
    Answered(u8),
    /// The stream, or the connection with it, was ended without an answer.
    Reset,
}

/// Sends one request on a connection of its own.
pub(super) fn send(entry: &Entry, request: &Request) -> Outcome {
    let mut stream = entry.connect().unwrap();
    let mut sent = PREFACE.to_vec();
    push_frame(&mut sent, SETTINGS, 0, 0, &[]);
    let has_body = !request.body.is_empty();
    let has_trailers = !request.trailers.is_empty();
    let ends = |is_last: bool| if is_last { END_STREAM } else { 0 };
    let head = block(request.fields.iter().map(|(name, value)| (*name, value.as_str())));
    push_frame(&mut sent, HEADERS, END_HEADERS | ends(!has_body && !has_trailers), 1, &head);
    if has_body {
        push_frame(&mut sent, DATA, ends(!has_trailers), 1, request.body.as_bytes());
    }
    if has_trailers {
        let trailers = block(request.trailers.iter().copied());
        push_frame(&mut sent, HEADERS, END_HEADERS | END_STREAM, 1, &trailers);
    }
    let _ = stream.write_all(&sent); // refused half-way: the answer tells
    outcome(stream)
}

fn outcome(mut stream: impl Read) -> Outcome {
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).is_err() {
            return Outcome::Reset;
        }
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; len as usize];
        if stream.read_exact(&mut payload).is_err() {
            return Outcome::Reset;
        }
        match head[3] {
            HEADERS => return Outcome::Answered(payload[0]),
            RST_STREAM | GOAWAY => return Outcome::Reset,
            _ => {}
        }
    }
}

fn push_frame(sent: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    sent.extend_from_slice(&[len[1], len[2], len[3], kind, flags]);
    sent.extend_from_slice(&stream.to_be_bytes());
    sent.extend_from_slice(payload);
}

/// RFC 7541 6.2.2: literals without indexing, with new names and no Huffman coding.
fn block<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            let len = u8::try_from(text.len()).unwrap();
            assert!(len < 127, "longer ones are written otherwise");
            block.push(len);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}
