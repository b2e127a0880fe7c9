//! Why a request is refused that could be read in two ways, or in none.

/// A request that is refused: 400, and the connection closes. Fault: the client. Retry: no, it
/// would be refused everywhere. What each means is in its [words](Malformed::words).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed request: {}: {}", self.reason(), self.text())]
pub(super) enum Malformed {
    BareLf,
    BareCr,
    ObsFold,
    EmptyLines,
    RequestLine,
    RequestLineTooLong,
    Method,
    Version,
    Target,
    HeaderName,
    HeaderValue,
    TooManyHeaders,
    HeadTooLarge,
    LookalikeName,
    LengthAndEncoding,
    SeveralLengths,
    ContentLength,
    TransferEncoding,
    EncodingInHttp10,
    ConnectWithBody,
    ChunkSize,
    ChunkEnd,
    TrailersTooLarge,
    TrailerName,
    HostMissing,
    SeveralHosts,
    Host,
    HostMismatch,
    Userinfo,
    Expect,
    Connection,
    Deadline,
}

impl Malformed {
    /// The word of the answer.
    pub(super) const fn reason(self) -> &'static str {
        self.words().0
    }

    /// The same for people.
    const fn text(self) -> &'static str {
        self.words().1
    }

    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::BareLf => ("bare_lf", "a line ends in a line feed without a carriage return"),
            Self::BareCr => ("bare_cr", "a carriage return without its line feed"),
            Self::ObsFold => ("obs_fold", "a header line begins with white space"),
            Self::EmptyLines => ("empty_lines", "more than one empty line before the request"),
            Self::RequestLine => (
                "request_line",
                "its first line is not a method, a target and a version with one space between",
            ),
            Self::RequestLineTooLong => {
                ("request_line_too_long", "its first line is longer than 8 KiB")
            }
            Self::Method => {
                ("method", "its method has other letters than capitals, digits, - and _")
            }
            Self::Version => ("version", "its version is neither HTTP/1.0 nor HTTP/1.1"),
            Self::Target => (
                "target",
                "its target has a form that its method does not have, or bytes that no target has",
            ),
            Self::HeaderName => (
                "header_name",
                "the name of a header is no token, or white space is before its colon",
            ),
            Self::HeaderValue => ("header_value", "the value of a header has a control character"),
            Self::TooManyHeaders => ("too_many_headers", "more than 100 header lines"),
            Self::HeadTooLarge => ("head_too_large", "its head is larger than 32 KiB"),
            Self::LookalikeName => (
                "lookalike_name",
                "a header that some take for Content-Length or Transfer-Encoding",
            ),
            Self::LengthAndEncoding => {
                ("length_and_encoding", "both Content-Length and Transfer-Encoding")
            }
            Self::SeveralLengths => ("several_lengths", "several Content-Length headers"),
            Self::ContentLength => {
                ("content_length", "its Content-Length is not a plain decimal number below 2^63")
            }
            Self::TransferEncoding => {
                ("transfer_encoding", "its Transfer-Encoding is not chunked, once")
            }
            Self::EncodingInHttp10 => {
                ("encoding_in_http10", "a Transfer-Encoding in HTTP/1.0, which has none")
            }
            Self::ConnectWithBody => ("connect_with_body", "a CONNECT with a body"),
            Self::ChunkSize => (
                "chunk_size",
                "the size of a chunk is not 1 to 16 hexadecimal digits and a line end",
            ),
            Self::ChunkEnd => ("chunk_end", "a chunk is longer than it said"),
            Self::TrailersTooLarge => {
                ("trailers_too_large", "trailers of more than 8 KiB or 100 lines")
            }
            Self::TrailerName => {
                ("trailer_name", "a trailer about framing, routing or authentication")
            }
            Self::HostMissing => ("host_missing", "nothing says which host is meant"),
            Self::SeveralHosts => ("several_hosts", "several Host headers"),
            Self::Host => ("host", "its Host is not a name or address with an optional port"),
            Self::HostMismatch => ("host_mismatch", "its Host is not the host of its target"),
            Self::Userinfo => ("userinfo", "its target has a user name before the host"),
            Self::Expect => ("expect", "it expects something else than 100-continue"),
            Self::Connection => (
                "connection",
                "its Connection header is no list of tokens, or names one that others rely on",
            ),
            Self::Deadline => (
                "deadline",
                "its x-murmesh-deadline-ms is not one whole number of milliseconds from 0 to 2^64 - 1",
            ),
        }
    }
}
