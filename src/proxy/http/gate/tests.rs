use httparse::Request;
use proptest::prelude::*;

use super::*;

/// What passes of `pieces`, and the word of the refusal.
fn fed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Option<&'static str>) {
    let (mut gate, mut passed) = (Gate::new(), Vec::new());
    for piece in pieces {
        gate.handle_bytes(Bytes::copy_from_slice(piece));
        match drained(&mut gate) {
            Ok(more) => passed.extend(more),
            Err((more, malformed)) => {
                passed.extend(more);
                return (passed, Some(malformed.reason()));
            }
        }
    }
    (passed, None)
}

fn drained(gate: &mut Gate) -> Result<Vec<u8>, (Vec<u8>, Malformed)> {
    let mut passed = Vec::new();
    loop {
        match gate.poll_pass() {
            Ok(Some(bytes)) => passed.extend_from_slice(&bytes),
            Ok(None) => return Ok(passed),
            Err(malformed) => return Err((passed, malformed)),
        }
    }
}

/// The same at once and byte by byte.
fn judged(bytes: &[u8]) -> (Vec<u8>, Option<&'static str>) {
    let at_once = fed([bytes]);
    assert_eq!(fed(bytes.chunks(1)), at_once, "{}", bytes.escape_ascii());
    at_once
}

fn after(gate: &mut Gate, bytes: &'static [u8]) -> Vec<u8> {
    gate.handle_bytes(Bytes::from_static(bytes));
    drained(gate).unwrap()
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
const UPGRADE: &[u8] =
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";

#[test]
fn first_line_of_a_head_that_is_refused_can_still_be_read() {
    let line = |pieces: &[&'static [u8]]| {
        let mut gate = Gate::new();
        let refused = pieces.iter().any(|piece| {
            gate.handle_bytes(Bytes::from_static(piece));
            drained(&mut gate).is_err()
        });
        assert!(refused);
        gate.refused_line().to_vec()
    };
    let two_hosts = b"GET /a?b HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
    assert_eq!(line(&[two_hosts]), b"GET /a?b HTTP/1.1");
    assert_eq!(line(&[&two_hosts[..5], &two_hosts[5..]]), b"GET /a?b HTTP/1.1");
    assert_eq!(line(&[GET.as_bytes(), two_hosts]), b"GET /a?b HTTP/1.1", "the second request");
    assert_eq!(line(&[b"GET / HTTP/1.1\nHost: a\n\n"]), b"GET / HTTP/1.1");
    assert_eq!(line(&[&[b'a'; 10_000]]).len(), 8 * 1024);
    let chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
    assert_eq!(line(&[chunked]), b"", "its head was well");
}

#[test]
fn what_is_usual_passes_unchanged() {
    for usual in [
        GET.to_owned(),
        "GET / HTTP/1.0\r\n\r\n".to_owned(),
        "GET /\"{^}\\?b={c}|d^`\\ HTTP/1.1\r\nhost:a\r\nx: \t y\u{e9} \r\nEmpty:\r\n\r\n"
            .to_owned(),
        "OPTIONS * HTTP/1.1\r\nHost: web.mesh:80\r\n\r\n".to_owned(),
        "GET http://web.mesh HTTP/1.1\r\nHost: WEB.mesh:80\r\n\r\n".to_owned(),
        "GET HTTPS://[::1]:8443/a HTTP/1.1\r\nHost: [::1]:8443\r\n\r\n".to_owned(),
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned() + GET,
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /".to_owned() + GET,
        "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 1\r\n\r\n\n"
            .to_owned(),
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n".to_owned()
            + "a\r\n0\r\n\r\n0\r\n\r\n\r\n000F\r\n0123456789abcde\r\n0\r\n\r\n"
            + GET,
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned()
            + "1\r\na\r\n00\r\nContent-Digest: x\r\ny:\r\n\r\n"
            + GET,
    ] {
        assert_eq!(judged(usual.as_bytes()), (usual.clone().into_bytes(), None), "{usual:?}");
    }
}

#[test]
fn one_empty_line_before_a_request_is_no_part_of_it() {
    let passed = |bytes: String| {
        let (passed, refused) = judged(bytes.as_bytes());
        (String::from_utf8(passed).unwrap(), refused)
    };
    assert_eq!(passed(format!("\r\n{GET}\r\n{GET}\r\n")), (format!("{GET}{GET}"), None));
    assert_eq!(passed(format!("{GET}\r\n\r\n{GET}")), (GET.into(), Some("empty_lines")));
    assert_eq!(passed(format!("\n{GET}")), (String::new(), Some("bare_lf")));
}

/// Each is refused with its word, and nothing of it passes.
#[test]
fn a_head_that_can_be_read_in_two_ways_is_refused_whole() {
    let long = |len: usize| "a".repeat(len);
    let with = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n");
    let line = |line: &str| format!("{line}\r\nHost: a\r\n\r\n");
    for (attack, word, head) in [
        ("CL.TE", "length_and_encoding", with("Content-Length: 5\r\nTransfer-Encoding: chunked")),
        ("TE.CL", "length_and_encoding", with("Transfer-Encoding: chunked\r\nContent-Length: 5")),
        ("CL.CL", "several_lengths", with("Content-Length: 5\r\nContent-Length: 6")),
        ("CL.CL equal", "several_lengths", with("Content-Length: 5\r\ncontent-length: 5")),
        ("CL list", "content_length", with("Content-Length: 5, 5")),
        ("CL plus", "content_length", with("Content-Length: +5")),
        ("CL minus", "content_length", with("Content-Length: -1")),
        ("CL hexadecimal", "content_length", with("Content-Length: 0x5")),
        ("CL octal", "content_length", with("Content-Length: 010")),
        ("CL fraction", "content_length", with("Content-Length: 5.0")),
        ("CL with a space in it", "content_length", with("Content-Length: 1 0")),
        ("CL empty", "content_length", with("Content-Length: ")),
        ("CL overflow", "content_length", with("Content-Length: 18446744073709551621")),
        ("CL signed overflow", "content_length", with("Content-Length: 9223372036854775808")),
        ("CL after a tab", "content_length", with("Content-Length:\t5")),
        ("CL before a space", "content_length", with("Content-Length: 5 ")),
        ("CL look-alike", "lookalike_name", with("Content_Length: 5")),
        ("TE.TE", "transfer_encoding", with("Transfer-Encoding: chunked\r\nTransfer-Encoding: x")),
        (
            "TE twice",
            "transfer_encoding",
            with("Transfer-Encoding: chunked\r\nTransfer-encoding: chunked"),
        ),
        ("TE list", "transfer_encoding", with("Transfer-Encoding: gzip, chunked")),
        ("TE identity", "transfer_encoding", with("Transfer-Encoding: identity")),
        ("TE not last", "transfer_encoding", with("Transfer-Encoding: chunked, identity")),
        ("TE quoted", "transfer_encoding", with("Transfer-Encoding: \"chunked\"")),
        ("TE prefix", "transfer_encoding", with("Transfer-Encoding: xchunked")),
        ("TE parameter", "transfer_encoding", with("Transfer-Encoding: chunked;a=b")),
        ("TE empty", "transfer_encoding", with("Transfer-Encoding:")),
        ("TE vertical tab", "header_value", with("Transfer-Encoding: \x0bchunked")),
        ("TE tab", "transfer_encoding", with("Transfer-Encoding:\tchunked")),
        ("TE look-alike", "lookalike_name", with("Transfer_Encoding: chunked")),
        ("TE behind a bare LF", "bare_lf", with("X: a\nTransfer-Encoding: chunked")),
        ("TE behind a bare CR", "bare_cr", with("X: a\rTransfer-Encoding: chunked")),
        ("TE and a space", "header_name", with("Transfer-Encoding : chunked")),
        ("TE and a tab", "header_name", with("Transfer-Encoding\t: chunked")),
        ("TE folded", "obs_fold", with("Transfer-Encoding:\r\n chunked")),
        (
            "TE in 1.0",
            "encoding_in_http10",
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
        ),
        ("first header indented", "obs_fold", line("GET / HTTP/1.1\r\n X: a")),
        ("NUL in a name", "header_name", with("X\0: a")),
        ("high byte in a name", "header_name", with("X\u{e9}: a")),
        ("no name", "header_name", with(": a")),
        ("no colon", "header_name", with("X")),
        ("NUL in a value", "header_value", with("X: a\0b")),
        ("expectation", "expect", with("Expect: 100-continue, x")),
        ("no host", "host_missing", "GET / HTTP/1.1\r\n\r\n".into()),
        ("two hosts", "several_hosts", with("Host: b")),
        ("the same host twice", "several_hosts", with("Host: a")),
        ("empty host", "host", "GET / HTTP/1.1\r\nHost: \r\n\r\n".into()),
        ("host with a path", "host", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into()),
        ("host list", "host", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n".into()),
        ("host with a user", "userinfo", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".into()),
        ("host with a bad port", "host", "GET / HTTP/1.1\r\nHost: a:+80\r\n\r\n".into()),
        ("half an address", "host", "GET / HTTP/1.1\r\nHost: [\r\n\r\n".into()),
        ("absolute-form against Host", "host_mismatch", line("GET http://b/ HTTP/1.1")),
        ("absolute-form, another port", "host_mismatch", line("GET http://a:81/ HTTP/1.1")),
        ("absolute-form with a user", "userinfo", line("GET http://a@b/ HTTP/1.1")),
        ("absolute-form without host", "host", line("GET http:///a HTTP/1.1")),
        ("another scheme", "target", line("GET file://a/ HTTP/1.1")),
        ("asterisk-form", "target", line("GET * HTTP/1.1")),
        ("authority-form", "target", line("GET a:80 HTTP/1.1")),
        ("no slash", "target", line("GET index HTTP/1.1")),
        ("CONNECT to a path", "host", line("CONNECT / HTTP/1.1")),
        ("CONNECT without a port", "target", line("CONNECT a HTTP/1.1")),
        ("CONNECT against Host", "host_mismatch", line("CONNECT b:80 HTTP/1.1")),
        (
            "CONNECT with a body",
            "connect_with_body",
            line("CONNECT a:80 HTTP/1.1\r\nContent-Length: 1"),
        ),
        ("fragment", "target", line("GET /a#b HTTP/1.1")),
        ("angle brackets", "target", line("GET /<a> HTTP/1.1")),
        ("back-tick", "target", line("GET /` HTTP/1.1")),
        ("quote in a query", "target", line("GET /?\" HTTP/1.1")),
        ("high byte in the target", "target", line("GET /\u{e9} HTTP/1.1")),
        ("control in the target", "request_line", line("GET /\x01 HTTP/1.1")),
        ("two spaces", "request_line", line("GET  / HTTP/1.1")),
        ("space at the end", "request_line", line("GET / HTTP/1.1 ")),
        ("tab for a space", "request_line", line("GET\t/ HTTP/1.1")),
        ("space in the target", "version", line("GET /a b HTTP/1.1")),
        ("space before the method", "obs_fold", line(" GET / HTTP/1.1")),
        ("method in lower case", "method", line("head / HTTP/1.1")),
        ("HTTP/0.9", "request_line", "GET /\r\n\r\n".into()),
        ("HTTP/1.2", "version", line("GET / HTTP/1.2")),
        ("HTTP/2", "version", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
        ("version in lower case", "version", line("GET / http/1.1")),
        ("TLS", "bare_lf", "\x16\x03\x01\n".into()),
        ("bare LF everywhere", "bare_lf", "GET / HTTP/1.1\nHost: a\n\n".into()),
        ("CR CR LF", "bare_cr", line("GET / HTTP/1.1\r")),
        (
            "long request line",
            "request_line_too_long",
            line(&format!("GET /{} HTTP/1.1", long(8192))),
        ),
        ("endless request line", "request_line_too_long", long(8192)),
        ("long head", "head_too_large", with(&format!("X: {}", long(32 * 1024)))),
        ("many headers", "too_many_headers", with(&vec!["X: a"; 100].join("\r\n"))),
    ] {
        let stream = head.clone() + GET;
        assert_eq!(judged(stream.as_bytes()), (Vec::new(), Some(word)), "{attack}: {head:?}");
        let pipelined = judged(format!("{GET}{stream}").as_bytes());
        assert_eq!(pipelined, (GET.into(), Some(word)), "{attack}, pipelined");
    }
}

/// Chunk data before the fault passes; the message never ends.
#[test]
fn a_chunked_body_that_can_be_read_in_two_ways_is_refused() {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long = format!("X: {}\r\n\r\n", "a".repeat(8 * 1024));
    let many = "X: a\r\n".repeat(101) + "\r\n";
    for (attack, word, clear, bad) in [
        ("extension", "chunk_size", "", "1;a=b\r\nx\r\n"),
        ("extension that hides a line", "chunk_size", "", "1;\n\r\nx\r\n"),
        ("space after the size", "chunk_size", "", "1 \r\nx\r\n"),
        ("space before the size", "chunk_size", "", " 1\r\nx\r\n"),
        ("bare LF", "chunk_size", "", "1\nx\r\n"),
        ("bare CR", "chunk_size", "", "1\rx\r\n"),
        ("no digit", "chunk_size", "", "\r\n"),
        ("hexadecimal prefix", "chunk_size", "", "0x1\r\nx\r\n"),
        ("plus", "chunk_size", "", "+1\r\nx\r\n"),
        ("minus", "chunk_size", "", "-1\r\nx\r\n"),
        ("underscore", "chunk_size", "", "1_0\r\nx\r\n"),
        ("overflow", "chunk_size", "", "10000000000000001\r\nx\r\n"),
        ("signed overflow", "chunk_size", "", "8000000000000000\r\nx\r\n"),
        ("endless size", "chunk_size", "", "00000000000000000001\r\nx\r\n"),
        ("longer than it says", "chunk_end", "1\r\nx", "y\r\n0\r\n\r\n"),
        ("ends in a bare LF", "chunk_end", "1\r\nx", "\n0\r\n\r\n"),
        ("ends in a bare CR", "chunk_end", "1\r\nx", "\r0\r\n\r\n"),
        ("framing trailer", "trailer_name", "0\r\n", "Content-Length: 1\r\n\r\n"),
        ("routing trailer", "trailer_name", "0\r\n", "X: a\r\nhost: b\r\n\r\n"),
        ("forwarding trailer", "trailer_name", "0\r\n", "x_forwarded_for: ::1\r\n\r\n"),
        ("authenticating trailer", "trailer_name", "0\r\n", "Authorization: x\r\n\r\n"),
        ("our trailer", "trailer_name", "0\r\n", "X-Murmesh-Peer: x\r\n\r\n"),
        ("folded trailer", "obs_fold", "0\r\n", "X: a\r\n b\r\n\r\n"),
        ("trailer and a space", "header_name", "0\r\n", "X : a\r\n\r\n"),
        ("bare LF after the last chunk", "bare_lf", "0\r\n", "\n"),
        ("a request for trailers", "header_name", "0\r\n", "GET / HTTP/1.1\r\n\r\n"),
        ("long trailers", "trailers_too_large", "0\r\n", &long),
        ("many trailers", "trailers_too_large", "0\r\n", &many),
    ] {
        let (passed, refused) = judged(format!("{head}{clear}{bad}{GET}").as_bytes());
        assert_eq!(refused, Some(word), "{attack}");
        assert_eq!(String::from_utf8(passed).unwrap(), format!("{head}{clear}"), "{attack}");
    }
}

#[test]
fn a_refused_client_stays_refused() {
    let mut gate = Gate::new();
    gate.handle_bytes(Bytes::from_static(b"\n"));
    assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
    assert!(!gate.wants_more());
    gate.handle_bytes(Bytes::from_static(GET.as_bytes()));
    assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
}

#[test]
fn what_follows_a_request_to_upgrade_waits_for_the_answer() {
    for open in [UPGRADE, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"] {
        let mut gate = Gate::new();
        assert_eq!(after(&mut gate, open), open);
        assert_eq!(after(&mut gate, b"\n\x81\0"), b"");
        assert!(!gate.is_between_messages());
        gate.handle_bytes(Bytes::from_static(b"\n"));
        assert_eq!(gate.take_unpassed(), b"\n\x81\0\n"[..]);
    }
}

#[test]
fn a_declined_upgrade_is_followed_by_requests() {
    let mut gate = Gate::new();
    assert_eq!(after(&mut gate, UPGRADE), UPGRADE);
    assert_eq!(after(&mut gate, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\n"), b"");
    gate.declined();
    assert_eq!(gate.poll_pass().unwrap().unwrap(), GET);
    assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
}

#[test]
fn what_nobody_asked_for_changes_nothing() {
    let mut gate = Gate::new();
    gate.declined();
    gate.handle_bytes(Bytes::from_static(b"\n"));
    assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
}

/// 64 KiB behind an upgrade, then reading stops.
#[test]
fn a_client_cannot_make_us_hold_more_than_the_bound() {
    let mut gate = Gate::new();
    after(&mut gate, UPGRADE);
    let mut held_len = 0;
    while gate.wants_more() {
        assert_eq!(after(&mut gate, &[0; 1024]), b"");
        held_len += 1024;
    }
    assert_eq!(held_len, HELD_LEN_MAX);
}

#[test]
fn a_connection_rests_only_between_messages() {
    let mut gate = Gate::new();
    assert!(gate.is_between_messages());
    for (piece, rests) in [
        (&b"GE"[..], false),
        (b"T / HTTP/1.1\r\nHost: a\r\n\r\n", true),
        (b"\r", false),
        (b"\n", true),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1", false),
        (b"2", true),
    ] {
        after(&mut gate, piece);
        assert_eq!(gate.is_between_messages(), rests, "{}", piece.escape_ascii());
    }
}

/// A whole head and a body pass in the very buffer that they came in.
#[test]
fn what_comes_in_one_piece_is_not_copied() {
    let bytes = Bytes::from(format!(
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123456789{GET}GET"
    ));
    let mut gate = Gate::new();
    gate.handle_bytes(bytes.clone());
    let passed = gate.poll_pass().unwrap().unwrap();
    assert_eq!(passed.as_ptr(), bytes.as_ptr());
    assert_eq!(passed, bytes[..bytes.len() - 3]);
}

/// Pieces of requests, good and bad, in any order.
fn streams() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        GET,
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nContent-Length: 3\r\n\r\n",
        "GET / HTTP/1.1\r\n",
        "POST /a?b HTTP/1.1\r\nHost: a\r\n",
        "CONNECT a:1 HTTP/1.1\r\n",
        "Host: a\r\n",
        "Content-Length: 3\r\n",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Upgrade: x\r\n",
        "X: y z\t\r\n",
        "\r\n",
        "\r\n",
        "\r\n",
        "abc",
        "3\r\nabc\r\n",
        "0\r\n\r\n",
        "\n",
        "\r",
        " ",
        "\0",
        ":",
        "\u{e9}",
    ]);
    let junk = any::<u8>().prop_map(|byte| vec![byte]);
    let part = prop_oneof![12 => word.prop_map(|word| word.as_bytes().to_vec()), 1 => junk];
    prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn how_bytes_are_cut_changes_nothing(
        stream in streams(),
        cuts in prop::collection::vec(1..40_usize, 1..64),
    ) {
        let (mut rest, mut pieces) = (&stream[..], Vec::new());
        for cut in cuts.into_iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, more) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = more;
        }
        prop_assert_eq!(fed(pieces), fed([&stream[..]]));
    }

    /// Reads what passes as the standard says, with nothing but httparse and no leniency: it
    /// finds whole requests, and the last may lack only its end.
    #[test]
    fn what_passes_is_whole_requests_to_another_parser(stream in streams()) {
        let (passed, _) = fed([&stream[..]]);
        let mut rest = &passed[..];
        while !rest.is_empty() {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut request = Request::new(&mut headers);
            let parsed = request.parse(rest);
            prop_assert!(matches!(parsed, Ok(Status::Complete(_))), "{}", rest.escape_ascii());
            let Ok(Status::Complete(len)) = parsed else { break };
            let value = |name: &str| request.headers.iter()
                .find(|header| header.name.eq_ignore_ascii_case(name))
                .map(|header| std::str::from_utf8(header.value).unwrap());
            rest = &rest[len..];
            if value("transfer-encoding").is_some() {
                loop {
                    let Ok(Status::Complete((line, size))) = httparse::parse_chunk_size(rest)
                    else { prop_assert!(rest.is_empty()); break };
                    let len = (line + usize::try_from(size).unwrap() + 2).min(rest.len());
                    rest = &rest[len..];
                    if size == 0 { break }
                }
            } else {
                let len: usize = value("content-length").map_or(0, |len| len.parse().unwrap());
                rest = &rest[len.min(rest.len())..];
            }
            let is_last = value("upgrade").is_some() || request.method == Some("CONNECT");
            prop_assert!(!is_last || rest.is_empty(), "something passed behind an upgrade");
        }
    }
}
