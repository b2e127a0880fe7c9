//! Why a request is refused that could be read in two ways, or in none.

/// A request that is refused: 400, and the connection closes. Fault: the client. Retry: no, it
/// would be refused everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed request: {}", self.reason())]
pub(super) enum Malformed {
    /// A line ends in a line feed alone.
    BareLf,
    /// A carriage return without its line feed.
    BareCr,
    /// A header line begins with white space.
    ObsFold,
    /// More than one empty line before a request.
    EmptyLines,
    /// Not a method, a target and a version with one space between each.
    RequestLine,
    /// Longer than 8 KiB.
    RequestLineTooLong,
    /// Not of capital letters, digits, `-` and `_`.
    Method,
    /// Neither HTTP/1.0 nor HTTP/1.1.
    Version,
    /// A form of target that the method does not have, or bytes that no target has.
    Target,
    /// Not a token, or white space before the colon.
    HeaderName,
    /// A control character in a value.
    HeaderValue,
    /// More than 100 lines.
    TooManyHeaders,
    /// More than 32 KiB.
    HeadTooLarge,
    /// A name that some applications take for a framing header, such as `content_length`.
    LookalikeName,
    /// Both `Content-Length` and `Transfer-Encoding`.
    LengthAndEncoding,
    /// Several `Content-Length` lines, equal or not.
    SeveralLengths,
    /// Not a plain decimal number below 2^63.
    ContentLength,
    /// Not exactly one `chunked`.
    TransferEncoding,
    /// `Transfer-Encoding` in HTTP/1.0, which has none.
    EncodingInHttp10,
    /// Content of a CONNECT, which has no meaning.
    ConnectWithBody,
    /// Not one to 16 hexadecimal digits and a line end. Extensions are refused too.
    ChunkSize,
    /// A chunk that is longer than it said.
    ChunkEnd,
    /// More than 8 KiB or 100 lines.
    TrailersTooLarge,
    /// A trailer about framing, routing or authentication.
    TrailerName,
    /// Nothing says which host is meant.
    HostMissing,
    /// Several `Host` lines.
    SeveralHosts,
    /// Empty, or not a name or address with an optional port.
    Host,
    /// `Host` and target name different hosts.
    HostMismatch,
    /// A user name before the host.
    Userinfo,
    /// An expectation other than `100-continue`.
    Expect,
    /// `Connection` is no list of tokens, or would take away a header that others rely on.
    Connection,
    /// `x-murmesh-deadline-ms` is not one number of milliseconds.
    Deadline,
}

impl Malformed {
    /// The word for metrics, events and the answer.
    pub(super) const fn reason(self) -> &'static str {
        match self {
            Self::BareLf => "bare_lf",
            Self::BareCr => "bare_cr",
            Self::ObsFold => "obs_fold",
            Self::EmptyLines => "empty_lines",
            Self::RequestLine => "request_line",
            Self::RequestLineTooLong => "request_line_too_long",
            Self::Method => "method",
            Self::Version => "version",
            Self::Target => "target",
            Self::HeaderName => "header_name",
            Self::HeaderValue => "header_value",
            Self::TooManyHeaders => "too_many_headers",
            Self::HeadTooLarge => "head_too_large",
            Self::LookalikeName => "lookalike_name",
            Self::LengthAndEncoding => "length_and_encoding",
            Self::SeveralLengths => "several_lengths",
            Self::ContentLength => "content_length",
            Self::TransferEncoding => "transfer_encoding",
            Self::EncodingInHttp10 => "encoding_in_http10",
            Self::ConnectWithBody => "connect_with_body",
            Self::ChunkSize => "chunk_size",
            Self::ChunkEnd => "chunk_end",
            Self::TrailersTooLarge => "trailers_too_large",
            Self::TrailerName => "trailer_name",
            Self::HostMissing => "host_missing",
            Self::SeveralHosts => "several_hosts",
            Self::Host => "host",
            Self::HostMismatch => "host_mismatch",
            Self::Userinfo => "userinfo",
            Self::Expect => "expect",
            Self::Connection => "connection",
            Self::Deadline => "deadline",
        }
    }
}
