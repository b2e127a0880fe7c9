//! The attacks: each is what a client sends, named after what it tries. In all of them `000` stands
//! for the attack's number, so that every request at the application is known by its target.

use Expected::{Cut, OneMessage, Refused};

use super::frames;

/// What must become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// 400, and the connection closes.
    Refused,
    /// The same, behind a sound head: that passes, and the application never gets an end.
    Cut,
    /// It is sound HTTP, which only a careless reader takes for something else: the application
    /// gets one message that cannot be read in two ways.
    OneMessage,
}

pub(super) struct Attack {
    pub(super) name: &'static str,
    pub(super) expected: Expected,
    pub(super) bytes: Vec<u8>,
}

const SMUGGLED: &str = "GET /smuggled/000 HTTP/1.1\r\nHost: web.mesh\r\n\r\n";

/// A request with these header lines and this body.
fn post(lines: &str, body: &str) -> String {
    format!("POST /attack/000 HTTP/1.1\r\nHost: web.mesh\r\n{lines}\r\n\r\n{body}")
}

/// A chunked request with this body.
fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked", body)
}

/// A request that smuggles where the reader takes `lines` for a length of nothing or for none.
fn hidden(lines: &str) -> String {
    post(lines, SMUGGLED)
}

/// The same where the reader takes `lines` for chunked.
fn hidden_chunk(lines: &str) -> String {
    post(lines, &format!("0\r\n\r\n{SMUGGLED}"))
}

/// A request that begins with this line.
fn line(line: &str) -> String {
    format!("{line}\r\nHost: web.mesh\r\n\r\n")
}

/// A request with these header lines and no other.
fn get(lines: &str) -> String {
    format!("GET /attack/000 HTTP/1.1\r\n{lines}\r\n\r\n")
}

/// Of HTTP/1.1.
pub(super) fn attacks() -> Vec<Attack> {
    let smuggled_len = SMUGGLED.len();
    let with_length = format!("Content-Length: {smuggled_len}");
    let table = [
        // Length against encoding.
        ("CL.TE", Refused, hidden_chunk("Content-Length: 49\r\nTransfer-Encoding: chunked")),
        (
            "TE.CL",
            Refused,
            post(
                "Transfer-Encoding: chunked\r\nContent-Length: 4",
                &format!("2e\r\n{SMUGGLED}\r\n0\r\n\r\n"),
            ),
        ),
        (
            "TE.CL with a length of nothing",
            Refused,
            hidden_chunk("Transfer-Encoding: chunked\r\nContent-Length: 0"),
        ),
        (
            "CL.TE with the encoding in another case",
            Refused,
            hidden_chunk("Content-Length: 49\r\ntRANSFER-eNCODING: CHUNKED"),
        ),
        (
            "CL.TE.CL",
            Refused,
            hidden_chunk("Content-Length: 5\r\nTransfer-Encoding: chunked\r\nContent-Length: 5"),
        ),
        (
            "CL.TE with an unknown coding",
            Refused,
            hidden("Content-Length: 0\r\nTransfer-Encoding: x"),
        ),
        // The encoding in disguise.
        ("TE.TE", Refused, hidden_chunk("Transfer-Encoding: chunked\r\nTransfer-Encoding: x")),
        (
            "TE.TE twice the same",
            Refused,
            hidden_chunk("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
        ),
        (
            "TE.TE identity first",
            Refused,
            hidden_chunk("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
        ),
        ("TE list", Refused, hidden_chunk("Transfer-Encoding: gzip, chunked")),
        (
            "TE chunked twice in one line",
            Refused,
            hidden_chunk("Transfer-Encoding: chunked, chunked"),
        ),
        ("TE identity", Refused, hidden_chunk("Transfer-Encoding: identity")),
        ("TE chunked not last", Refused, hidden_chunk("Transfer-Encoding: chunked, identity")),
        ("TE with a prefix", Refused, hidden_chunk("Transfer-Encoding: xchunked")),
        ("TE with a suffix", Refused, hidden_chunk("Transfer-Encoding: chunkedx")),
        ("TE quoted", Refused, hidden_chunk("Transfer-Encoding: \"chunked\"")),
        ("TE with a parameter", Refused, hidden_chunk("Transfer-Encoding: chunked; q=1")),
        ("TE with a comma", Refused, hidden_chunk("Transfer-Encoding: ,chunked")),
        ("TE empty", Refused, hidden_chunk("Transfer-Encoding:")),
        ("TE after a tab", Refused, hidden_chunk("Transfer-Encoding:\tchunked")),
        ("TE before a tab", Refused, hidden_chunk("Transfer-Encoding: chunked\t")),
        ("TE after a vertical tab", Refused, hidden_chunk("Transfer-Encoding: \x0bchunked")),
        ("TE after a form feed", Refused, hidden_chunk("Transfer-Encoding: \x0cchunked")),
        ("TE before a NUL", Refused, hidden_chunk("Transfer-Encoding: chunked\0")),
        ("TE with a space before the colon", Refused, hidden_chunk("Transfer-Encoding : chunked")),
        ("TE with a tab before the colon", Refused, hidden_chunk("Transfer-Encoding\t: chunked")),
        (
            "TE with a space before the name",
            Refused,
            hidden_chunk("X: y\r\n Transfer-Encoding: chunked"),
        ),
        ("TE folded", Refused, hidden_chunk("Transfer-Encoding:\r\n chunked")),
        ("TE folded with a tab", Refused, hidden_chunk("Transfer-Encoding:\r\n\tchunked")),
        ("TE behind a bare LF", Refused, hidden_chunk("X: y\nTransfer-Encoding: chunked")),
        ("TE behind a bare CR", Refused, hidden_chunk("X: y\rTransfer-Encoding: chunked")),
        ("TE behind CR CR LF", Refused, hidden_chunk("X: y\r\r\nTransfer-Encoding: chunked")),
        ("TE behind a NUL", Refused, hidden_chunk("X: y\0Transfer-Encoding: chunked")),
        ("TE with an underscore", Refused, hidden_chunk("Transfer_Encoding: chunked")),
        (
            "TE in HTTP/1.0",
            Refused,
            format!(
                "POST /attack/000 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}"
            ),
        ),
        (
            "TE as the first line, indented",
            Refused,
            format!(
                "POST /attack/000 HTTP/1.1\r\n Transfer-Encoding: chunked\r\nHost: web.mesh\r\n\r\n0\r\n\r\n{SMUGGLED}"
            ),
        ),
        // The length in disguise.
        ("CL.CL", Refused, hidden("Content-Length: 0\r\nContent-Length: 46")),
        ("CL.CL equal", Refused, post("Content-Length: 3\r\nContent-Length: 3", "abc")),
        ("CL list", Refused, post("Content-Length: 3, 3", "abc")),
        ("CL list of different ones", Refused, hidden("Content-Length: 0, 46")),
        ("CL with a plus", Refused, post("Content-Length: +3", "abc")),
        ("CL negative", Refused, hidden("Content-Length: -46")),
        ("CL hexadecimal", Refused, post("Content-Length: 0x3", "abc")),
        ("CL octal", Refused, post("Content-Length: 010", "12345678")),
        ("CL with a fraction", Refused, post("Content-Length: 3.0", "abc")),
        ("CL with an exponent", Refused, post("Content-Length: 3e0", "abc")),
        ("CL with a space in it", Refused, hidden("Content-Length: 4 6")),
        ("CL empty", Refused, hidden("Content-Length: ")),
        ("CL that overflows 64 bits", Refused, hidden("Content-Length: 18446744073709551616")),
        ("CL that overflows 63 bits", Refused, hidden("Content-Length: 9223372036854775808")),
        ("CL after a tab", Refused, post("Content-Length:\t3", "abc")),
        ("CL before a space", Refused, post("Content-Length: 3 ", "abc")),
        ("CL with a space before the colon", Refused, hidden("Content-Length : 46")),
        ("CL behind a NUL", Refused, hidden("X: y\0\r\nContent-Length: 46")),
        ("CL folded", Refused, hidden("Content-Length:\r\n 46")),
        ("CL with an underscore", Refused, hidden("Content_Length: 46")),
        ("CL with a high byte in the name", Refused, hidden("Content-Length\u{a0}: 46")),
        (
            "CL.0: a body where none is usual",
            OneMessage,
            format!(
                "GET /attack/000 HTTP/1.1\r\nHost: web.mesh\r\n{with_length}\r\n\r\n{SMUGGLED}"
            ),
        ),
        (
            "CL.0 of OPTIONS",
            OneMessage,
            format!(
                "OPTIONS /attack/000 HTTP/1.1\r\nHost: web.mesh\r\n{with_length}\r\n\r\n{SMUGGLED}"
            ),
        ),
        (
            "TE.0: chunks where no body is usual",
            OneMessage,
            format!(
                "DELETE /attack/000 HTTP/1.1\r\nHost: web.mesh\r\nTransfer-Encoding: chunked\r\n\r\n2e\r\n{SMUGGLED}\r\n0\r\n\r\n"
            ),
        ),
        (
            "CL.0 behind an expectation",
            OneMessage,
            hidden(&format!("Expect: 100-continue\r\n{with_length}")),
        ),
        (
            "CL.0 behind an odd expectation",
            Refused,
            hidden(&format!("Expect: y 100-continue\r\n{with_length}")),
        ),
        (
            "a length that names itself private",
            Refused,
            hidden(&format!("Connection: Content-Length\r\n{with_length}")),
        ),
        (
            "an encoding in the list of private headers",
            OneMessage,
            post(
                "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
                &format!("2e\r\n{SMUGGLED}\r\n0\r\n\r\n"),
            ),
        ),
        // Chunks.
        ("chunk extension", Cut, chunked("3;a=b\r\nabc\r\n0\r\n\r\n")),
        (
            "chunk extension that hides a line",
            Cut,
            chunked(&format!("2;\nxx\r\n31\r\n0\r\n\r\n{SMUGGLED}\r\n0\r\n\r\n")),
        ),
        ("chunk extension of the last chunk", Cut, chunked("0;a\r\n\r\n")),
        ("chunk size before a space", Cut, chunked("3 \r\nabc\r\n0\r\n\r\n")),
        ("chunk size after a space", Cut, chunked(" 3\r\nabc\r\n0\r\n\r\n")),
        ("chunk size with 0x", Cut, chunked("0x3\r\nabc\r\n0\r\n\r\n")),
        ("chunk size with a plus", Cut, chunked("+3\r\nabc\r\n0\r\n\r\n")),
        ("chunk size with a minus", Cut, chunked("-3\r\nabc\r\n0\r\n\r\n")),
        ("chunk size with an underscore", Cut, chunked("0_3\r\nabc\r\n0\r\n\r\n")),
        (
            "chunk size that overflows 64 bits",
            Cut,
            chunked("10000000000000003\r\nabc\r\n0\r\n\r\n"),
        ),
        ("chunk size that overflows 63 bits", Cut, chunked("8000000000000003\r\nabc\r\n0\r\n\r\n")),
        ("chunk size that is empty", Cut, chunked("\r\nabc\r\n0\r\n\r\n")),
        ("chunk size of no digits", Cut, chunked("g\r\nabc\r\n0\r\n\r\n")),
        ("chunk size that ends in a bare LF", Cut, chunked("3\nabc\r\n0\r\n\r\n")),
        ("chunk size that ends in a bare CR", Cut, chunked("3\rabc\r\n0\r\n\r\n")),
        ("chunk size that ends in CR CR LF", Cut, chunked("3\r\r\nabc\r\n0\r\n\r\n")),
        ("chunk longer than it says", Cut, chunked("3\r\nabcd\r\n0\r\n\r\n")),
        ("chunk that ends in a bare LF", Cut, chunked("3\r\nabc\n0\r\n\r\n")),
        ("chunk that ends in nothing", Cut, chunked("3\r\nabc0\r\n\r\n")),
        ("last chunk that ends in bare LFs", Cut, chunked("3\r\nabc\r\n0\n\n")),
        (
            "a request behind the last chunk, without its empty line",
            Cut,
            chunked(&format!("0\r\n{SMUGGLED}")),
        ),
        ("a length in the trailers", Cut, chunked("0\r\nContent-Length: 46\r\n\r\n")),
        ("a host in the trailers", Cut, chunked("0\r\nHost: admin.mesh\r\n\r\n")),
        ("a password in the trailers", Cut, chunked("0\r\nAuthorization: forged\r\n\r\n")),
        ("an identity in the trailers", Cut, chunked("0\r\nx-murmesh-peer: forged\r\n\r\n")),
        ("a folded trailer", Cut, chunked("0\r\nX: y\r\n z\r\n\r\n")),
        ("a trailer that ends in a bare LF", Cut, chunked("0\r\nX: y\n\r\n")),
        (
            "chunks that look like a request",
            OneMessage,
            chunked(
                "2e\r\nGET /smuggled/000 HTTP/1.1\r\nHost: web.mesh\r\n\r\n\r\n5\r\n0\r\n\r\n\r\n0\r\n\r\n",
            ),
        ),
        // Lines.
        ("bare LF everywhere", Refused, "GET /attack/000 HTTP/1.1\nHost: web.mesh\n\n".to_owned()),
        (
            "bare LF at the end of the head",
            Refused,
            "GET /attack/000 HTTP/1.1\r\nHost: web.mesh\r\n\n".to_owned(),
        ),
        (
            "bare CR at the end of the request line",
            Refused,
            "GET /attack/000 HTTP/1.1\rHost: web.mesh\r\n\r\n".to_owned(),
        ),
        (
            "CR CR LF at the end of the head",
            Refused,
            "GET /attack/000 HTTP/1.1\r\nHost: web.mesh\r\n\r\r\n".to_owned(),
        ),
        ("obs-fold", Refused, get("Host: web.mesh\r\nX: y\r\n z")),
        ("obs-fold of an empty line", Refused, get("Host: web.mesh\r\nX: y\r\n \r\nZ: z")),
        ("a header without a name", Refused, get("Host: web.mesh\r\n: y")),
        ("a header without a colon", Refused, get("Host: web.mesh\r\nGET /smuggled/000 HTTP/1.1")),
        ("a NUL in a name", Refused, get("Host: web.mesh\r\nX\0: y")),
        ("a NUL in a value", Refused, get("Host: web.mesh\r\nX: \0")),
        ("a DEL in a value", Refused, get("Host: web.mesh\r\nX: \x7f")),
        ("two empty lines first", Refused, format!("\r\n\r\n{}", get("Host: web.mesh"))),
        (
            "more headers than are read",
            Refused,
            get(&format!("Host: web.mesh\r\n{}", vec!["X: y"; 100].join("\r\n"))),
        ),
        (
            "a head without an end",
            Refused,
            get(&format!("Host: web.mesh\r\nX: {}", "y".repeat(33 * 1024))),
        ),
        // The request line.
        ("two spaces after the method", Refused, line("GET  /attack/000 HTTP/1.1")),
        ("a tab after the method", Refused, line("GET\t/attack/000 HTTP/1.1")),
        ("a space in the target", Refused, line("GET /attack/000 x HTTP/1.1")),
        (
            "a second request line in the first",
            Refused,
            line("GET /attack/000 HTTP/1.1 GET /smuggled/000 HTTP/1.1"),
        ),
        ("a space at the end", Refused, line("GET /attack/000 HTTP/1.1 ")),
        ("a space before the method", Refused, line(" GET /attack/000 HTTP/1.1")),
        ("a NUL in the target", Refused, line("GET /attack/000\0 HTTP/1.1")),
        ("a high byte in the target", Refused, line("GET /attack/000\u{e9} HTTP/1.1")),
        ("a fragment in the target", Refused, line("GET /attack/000#x HTTP/1.1")),
        (
            "a long request line",
            Refused,
            line(&format!("GET /attack/000?{} HTTP/1.1", "x".repeat(9_000))),
        ),
        ("HTTP/0.9", Refused, line("GET /attack/000")),
        ("HTTP/1.2", Refused, line("GET /attack/000 HTTP/1.2")),
        ("HTTP/2.0 in a line", Refused, line("GET /attack/000 HTTP/2.0")),
        ("HTTP/1.10", Refused, line("GET /attack/000 HTTP/1.10")),
        ("a version in another case", Refused, line("GET /attack/000 http/1.1")),
        ("a method that only some take for HEAD", Refused, line("head /attack/000 HTTP/1.1")),
        ("a method with a colon", Refused, line("GET: /attack/000 HTTP/1.1")),
        (
            "request splitting in the target, encoded",
            OneMessage,
            line("GET /attack/000?x=%20HTTP/1.1%0d%0aTransfer-Encoding:%20chunked%0d%0a HTTP/1.1"),
        ),
        (
            "request splitting in a value, encoded",
            OneMessage,
            get("Host: web.mesh\r\nX: y%0d%0aTransfer-Encoding: chunked"),
        ),
        // Who is asked.
        ("no Host", Refused, get("X: y")),
        ("double Host", Refused, get("Host: web.mesh\r\nHost: admin.mesh")),
        ("double Host, equal", Refused, get("Host: web.mesh\r\nHost: web.mesh")),
        ("empty Host", Refused, get("Host: ")),
        ("Host with a list", Refused, get("Host: web.mesh, admin.mesh")),
        ("Host with a space", Refused, get("Host: web.mesh admin.mesh")),
        ("Host with a path", Refused, get("Host: web.mesh/admin")),
        ("Host with a user", Refused, get("Host: web.mesh@admin.mesh")),
        ("Host with a bad port", Refused, get("Host: web.mesh:80@admin.mesh:80")),
        ("Host with a port that overflows", Refused, get("Host: web.mesh:65616")),
        ("Host before a tab", Refused, get("Host: web.mesh\t")),
        ("Host folded", Refused, get("Host: web.mesh\r\n admin.mesh")),
        ("Host with a space before the colon", Refused, get("Host: web.mesh\r\nHost : admin.mesh")),
        ("absolute-form against Host", Refused, line("GET http://admin.mesh/attack/000 HTTP/1.1")),
        (
            "absolute-form with a user",
            Refused,
            line("GET http://web.mesh@admin.mesh/attack/000 HTTP/1.1"),
        ),
        ("absolute-form with an empty host", Refused, line("GET http:///attack/000 HTTP/1.1")),
        (
            "absolute-form of another scheme",
            Refused,
            line("GET file://web.mesh/attack/000 HTTP/1.1"),
        ),
        (
            "absolute-form of the same host",
            OneMessage,
            line("GET http://web.mesh/attack/000 HTTP/1.1"),
        ),
        ("asterisk-form of GET", Refused, line("GET * HTTP/1.1")),
        ("authority-form of GET", Refused, line("GET web.mesh:80 HTTP/1.1")),
        ("a target without a slash", Refused, line("GET attack/000 HTTP/1.1")),
        ("CONNECT to a path", Refused, line("CONNECT /attack/000 HTTP/1.1")),
        ("CONNECT against Host", Refused, line("CONNECT admin.mesh:80 HTTP/1.1")),
        (
            "CONNECT with a body",
            Refused,
            format!(
                "CONNECT web.mesh:80 HTTP/1.1\r\nHost: web.mesh:80\r\n{with_length}\r\n\r\n{SMUGGLED}"
            ),
        ),
        // What belongs to a connection.
        (
            "h2c upgrade",
            OneMessage,
            get(
                "Host: web.mesh\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
            ),
        ),
        (
            "an upgrade that nobody asked for",
            OneMessage,
            get("Host: web.mesh\r\nUpgrade: websocket"),
        ),
        (
            "a WebSocket that is none",
            OneMessage,
            get(
                "Host: web.mesh\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777",
            ),
        ),
        (
            "Host in the list of private headers",
            Refused,
            get("Host: web.mesh\r\nConnection: close, Host"),
        ),
        (
            "a cookie in the list of private headers",
            Refused,
            get("Host: web.mesh\r\nConnection: cookie\r\nCookie: a=b"),
        ),
        (
            "an address in the list of private headers",
            Refused,
            get("Host: web.mesh\r\nConnection: X-Forwarded-For\r\nX-Forwarded-For: ::1"),
        ),
        (
            "a list of private headers that is none",
            Refused,
            get("Host: web.mesh\r\nConnection: a b"),
        ),
        (
            "a forged identity",
            OneMessage,
            get(
                "Host: web.mesh\r\nX-Murmesh-Peer: forged\r\nx_murmesh_peer: forged\r\nX_Forwarded_For: forged",
            ),
        ),
        (
            "a password for a proxy",
            OneMessage,
            get(
                "Host: web.mesh\r\nProxy-Authorization: forged\r\nProxy-Connection: keep-alive\r\nKeep-Alive: forged",
            ),
        ),
    ];
    table
        .into_iter()
        .map(|(name, expected, text)| Attack { name, expected, bytes: text.into() })
        .collect()
}

/// Of HTTP/2, to an application that speaks HTTP/1.1.
pub(super) fn frame_attacks() -> Vec<(&'static str, Expected, frames::Request)> {
    let usual = || {
        let pairs = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "web.mesh"),
            (":path", "/attack/000"),
        ];
        pairs.map(|(name, value)| (name, value.to_owned())).to_vec()
    };
    let request = |fields, body| frames::Request { fields, body, trailers: Vec::new() };
    let with = |name: &'static str, value: &str, body: &'static str| {
        let mut fields = usual();
        fields.push((name, value.to_owned()));
        request(fields, body)
    };
    let twice = |name: &'static str, values: [&str; 2]| {
        let mut fields = usual();
        fields.extend(values.map(|value| (name, value.to_owned())));
        request(fields, "abc")
    };
    let instead = |pseudo: &str, value: &str| {
        let mut fields = usual();
        let field = fields.iter_mut().find(|(name, _)| *name == pseudo).expect("it is usual");
        value.clone_into(&mut field.1);
        request(fields, "")
    };
    let without = |pseudo: &str| {
        let mut fields = usual();
        fields.retain(|(name, _)| *name != pseudo);
        request(fields, "")
    };
    let trailing = |name, value| frames::Request {
        fields: usual(),
        body: "abc",
        trailers: vec![(name, value)],
    };
    vec![
        ("h2.CL shorter than the body", Cut, with("content-length", "0", SMUGGLED)),
        ("h2.CL longer than the body", Cut, with("content-length", "99", SMUGGLED)),
        ("h2.CL list", Refused, with("content-length", "3,3", "abc")),
        ("h2.CL with a plus", Refused, with("content-length", "+3", "abc")),
        ("h2.CL octal", Refused, with("content-length", "03", "abc")),
        ("h2.CL.CL", Refused, twice("content-length", ["3", "0"])),
        ("h2.CL.CL equal", Refused, twice("content-length", ["3", "3"])),
        ("h2.CL with an underscore", Refused, with("content_length", "0", SMUGGLED)),
        (
            "h2.TE",
            Refused,
            with(
                "transfer-encoding",
                "chunked",
                "0\r\n\r\nGET /smuggled/000 HTTP/1.1\r\nHost: web.mesh\r\n\r\n",
            ),
        ),
        ("h2.TE with an underscore", Refused, with("transfer_encoding", "chunked", "0\r\n\r\n")),
        ("h2.TE in capitals", Refused, with("Transfer-Encoding", "chunked", "0\r\n\r\n")),
        ("h2 connection header", Refused, with("connection", "close", "")),
        ("h2 upgrade header", Refused, with("upgrade", "websocket", "")),
        ("h2 keep-alive header", Refused, with("keep-alive", "1", "")),
        ("h2 te header", Refused, with("te", "chunked", "")),
        (
            "h2 header injection in a value",
            Refused,
            with("x", "y\r\nTransfer-Encoding: chunked", "0\r\n\r\n"),
        ),
        (
            "h2 header injection with a bare LF",
            Refused,
            with("x", "y\nTransfer-Encoding: chunked", "0\r\n\r\n"),
        ),
        (
            "h2 header injection with a bare CR",
            Refused,
            with("x", "y\rTransfer-Encoding: chunked", "0\r\n\r\n"),
        ),
        ("h2 header injection with a NUL", Refused, with("x", "y\0", "")),
        (
            "h2 header injection in a name",
            Refused,
            with("x: y\r\ntransfer-encoding", "chunked", "0\r\n\r\n"),
        ),
        (
            "h2 header injection with a colon",
            Refused,
            with("transfer-encoding:chunked x", "y", "0\r\n\r\n"),
        ),
        (
            "h2 request splitting",
            Refused,
            with("x", "y\r\n\r\nGET /smuggled/000 HTTP/1.1\r\nHost: web.mesh", ""),
        ),
        (
            "h2 request line injection in the method",
            Refused,
            instead(":method", "GET /smuggled/000 HTTP/1.1\r\nX: y"),
        ),
        (
            "h2 request line injection with a space",
            Refused,
            instead(":method", "GET /smuggled/000"),
        ),
        ("h2 method in lower case", Refused, instead(":method", "connect")),
        (
            "h2 request line injection in the path",
            Refused,
            instead(":path", "/smuggled/000 HTTP/1.1\r\nX: y"),
        ),
        ("h2 path with a space", Refused, instead(":path", "/attack/000 HTTP/1.1")),
        (
            "h2 path that is another target",
            Refused,
            instead(":path", "http://admin.mesh/attack/000"),
        ),
        ("h2 path without a slash", Refused, instead(":path", "attack/000")),
        ("h2 path that is empty", Refused, instead(":path", "")),
        ("h2 path that is an asterisk", Refused, instead(":path", "*")),
        ("h2 path with a high byte", Refused, instead(":path", "/attack/000\u{e9}")),
        ("h2 scheme with a request in it", Refused, instead(":scheme", "http://admin.mesh/?")),
        ("h2 authority with a user", Refused, instead(":authority", "web.mesh@admin.mesh")),
        ("h2 authority with a line", Refused, instead(":authority", "web.mesh\r\nX: y")),
        ("h2 authority with a path", Refused, instead(":authority", "web.mesh/smuggled/000?")),
        ("h2 authority against Host", Refused, with("host", "admin.mesh", "")),
        ("h2 two Hosts", Refused, twice("host", ["web.mesh", "web.mesh"])),
        ("h2 without authority or Host", Refused, without(":authority")),
        ("h2 without a path", Refused, without(":path")),
        ("h2 two methods", Refused, {
            let mut fields = usual();
            fields.insert(0, (":method", "GET".to_owned()));
            request(fields, "")
        }),
        ("h2 a pseudo-header behind a header", Refused, {
            let mut fields = usual();
            fields.insert(0, ("x", "y".to_owned()));
            request(fields, "")
        }),
        ("h2 an unknown pseudo-header", Refused, {
            let mut fields = usual();
            fields.insert(0, (":x", "y".to_owned()));
            request(fields, "")
        }),
        (
            "h2 CONNECT without a port",
            Refused,
            request(
                vec![(":method", "CONNECT".to_owned()), (":authority", "web.mesh".to_owned())],
                "",
            ),
        ),
        ("h2 an odd expectation", Refused, with("expect", "y", "abc")),
        ("h2 a length in the trailers", Cut, trailing("content-length", "0")),
        ("h2 a password in the trailers", Cut, trailing("authorization", "forged")),
        ("h2 a pseudo-header in the trailers", Cut, trailing(":path", "/smuggled/000")),
        ("h2 a body that looks like a request", OneMessage, with("x", "y", SMUGGLED)),
        ("h2 a forged identity", OneMessage, with("x-murmesh-peer", "forged", "")),
        ("h2 a password for a proxy", OneMessage, with("proxy-authorization", "forged", "")),
    ]
}
