//! Two readers of the bytes that an application got, which disagree wherever HTTP/1.1 lets them.
//!
//! What both read alike leaves an application no choice.

/// One request as somebody reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) method: String,
    pub(super) target: String,
    /// Names in lower case.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    /// False for what ends before its end.
    pub(super) is_whole: bool,
}

impl Message {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(known, _)| known == name);
        values.next().map(|(_, value)| value.as_str())
    }
}

/// Reads as RFC 9112 says, and fails at the first byte that it does not allow.
pub(super) fn strictly(bytes: &[u8]) -> Result<Vec<Message>, String> {
    let mut reader = Strict { bytes, at: 0 };
    let mut messages = Vec::new();
    while reader.at < bytes.len() {
        let message = reader.message()?;
        let is_whole = message.is_whole;
        messages.push(message);
        if !is_whole {
            break;
        }
    }
    Ok(messages)
}

struct Strict<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Strict<'_> {
    fn message(&mut self) -> Result<Message, String> {
        let mut slots = [httparse::EMPTY_HEADER; 200];
        let mut request = httparse::Request::new(&mut slots);
        let rest = &self.bytes[self.at..];
        let parsed = request.parse(rest).map_err(|error| self.fault(&error.to_string()))?;
        let httparse::Status::Complete(len) = parsed else {
            let text = String::from_utf8_lossy(rest).into_owned();
            let target = text.split(' ').nth(1).unwrap_or_default().to_owned();
            let method = text.split(' ').next().unwrap_or_default().to_owned();
            return Ok(Message { method, target, headers: vec![], body: vec![], is_whole: false });
        };
        let head = String::from_utf8_lossy(&rest[..len]).into_owned();
        if head.replace("\r\n", "").contains(['\r', '\n']) {
            return Err(self.fault("a bare CR or LF"));
        }
        let mut headers: Vec<(String, String)> = Vec::new();
        for header in request.headers.iter() {
            let value = String::from_utf8_lossy(header.value).into_owned();
            headers.push((header.name.to_ascii_lowercase(), value));
        }
        let method = request.method.unwrap_or_default().to_owned();
        let target = request.path.unwrap_or_default().to_owned();
        self.at += len;
        let mut message = Message { method, target, headers, body: vec![], is_whole: true };
        if message.header("host").is_none() {
            return Err(self.fault("no host"));
        }
        for once in ["host", "content-length", "transfer-encoding"] {
            if message.headers.iter().filter(|(name, _)| name == once).count() > 1 {
                return Err(self.fault(&format!("several {once}")));
            }
        }
        match (message.header("transfer-encoding"), message.header("content-length")) {
            (Some(_), Some(_)) => return Err(self.fault("length and encoding")),
            (Some("chunked"), None) => self.chunks(&mut message)?,
            (Some(other), None) => return Err(self.fault(other)),
            (None, Some(len)) => {
                let len = len.parse::<u32>().map_err(|error| self.fault(&error.to_string()))?;
                message.is_whole = self.take(len as usize, &mut message.body);
            }
            (None, None) => {}
        }
        Ok(message)
    }

    fn chunks(&mut self, message: &mut Message) -> Result<(), String> {
        loop {
            let Some(line) = self.line() else {
                message.is_whole = false;
                return Ok(());
            };
            let size = u32::from_str_radix(&line, 16).map_err(|_| self.fault(&line))?;
            if size == 0 {
                break;
            }
            message.is_whole = self.take(size as usize, &mut message.body);
            if !message.is_whole {
                return Ok(());
            }
            match self.line().as_deref() {
                Some("") => {}
                Some(more) => return Err(self.fault(more)),
                None => {
                    message.is_whole = false;
                    return Ok(());
                }
            }
        }
        loop {
            match self.line().as_deref() {
                Some("") => return Ok(()),
                Some(_) => {}
                None => {
                    message.is_whole = false;
                    return Ok(());
                }
            }
        }
    }

    fn line(&mut self) -> Option<String> {
        let rest = &self.bytes[self.at..];
        let len = rest.windows(2).position(|pair| pair == b"\r\n")?;
        self.at += len + 2;
        Some(String::from_utf8_lossy(&rest[..len]).into_owned())
    }

    fn take(&mut self, len: usize, body: &mut Vec<u8>) -> bool {
        let rest = &self.bytes[self.at..];
        let taken = &rest[..len.min(rest.len())];
        body.extend_from_slice(taken);
        self.at += taken.len();
        taken.len() == len
    }

    fn fault(&self, what: &str) -> String {
        format!("{what} before {}: {}", self.at, self.bytes.escape_ascii())
    }
}

/// Reads as old and careless applications do: lines end in LF, the last header of a name counts,
/// `_` is `-`, a number is as many digits as there are, and a length goes before an encoding.
pub(super) fn carelessly(bytes: &[u8]) -> Vec<Message> {
    let (mut at, mut messages) = (0, Vec::new());
    while at < bytes.len() {
        let Some(request) = line(bytes, &mut at) else { break };
        if request.is_empty() {
            continue;
        }
        let mut words = request.split_ascii_whitespace().map(str::to_owned);
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers: Vec<(String, String)> = Vec::new();
        let mut is_whole = false;
        while let Some(text) = line(bytes, &mut at) {
            if text.is_empty() {
                is_whole = true;
                break;
            }
            match (text.split_once(':'), headers.last_mut()) {
                (_, Some((_, value))) if text.starts_with([' ', '\t']) => value.push_str(&text),
                (Some((name, value)), _) => {
                    let name = name.trim().to_ascii_lowercase().replace('_', "-");
                    headers.push((name, value.trim().to_owned()));
                }
                (None, _) => headers.push((text, String::new())),
            }
        }
        let last = |name: &str| headers.iter().rev().find(|(known, _)| known == name);
        let mut body = Vec::new();
        if let (Some((_, len)), true) = (last("content-length"), is_whole) {
            let len = digits(len, 10);
            let taken = &bytes[at..bytes.len().min(at + len)];
            (is_whole, at) = (taken.len() == len, at + taken.len());
            body.extend_from_slice(taken);
        } else if last("transfer-encoding").is_some_and(|(_, coding)| coding.contains("chunked")) {
            is_whole = loop {
                let Some(size) = line(bytes, &mut at) else { break false };
                let len = digits(&size, 16);
                if len == 0 {
                    break loop {
                        match line(bytes, &mut at) {
                            Some(trailer) if trailer.is_empty() => break true,
                            Some(_) => {}
                            None => break false,
                        }
                    };
                }
                let taken = &bytes[at..bytes.len().min(at + len)];
                at += taken.len();
                body.extend_from_slice(taken);
                if taken.len() < len || line(bytes, &mut at).is_none() {
                    break false;
                }
            };
        }
        messages.push(Message { method, target, headers, body, is_whole });
        if !is_whole {
            break;
        }
    }
    messages
}

fn line(bytes: &[u8], at: &mut usize) -> Option<String> {
    let rest = &bytes[*at..];
    let len = rest.iter().position(|byte| *byte == b'\n')?;
    *at += len + 1;
    Some(String::from_utf8_lossy(&rest[..len]).trim_end_matches('\r').to_owned())
}

fn digits(text: &str, radix: u32) -> usize {
    let len = text.find(|c: char| !c.is_digit(radix)).unwrap_or(text.len());
    usize::from_str_radix(&text[..len], radix).unwrap_or(0)
}
