//! The one codec: everything that members say to each other is encoded here and nowhere else.
//!
//! bincode 2.0.1, fixed-layout variable-length integers. It is unmaintained (RUSTSEC-2025-0141),
//! which is why nothing outside this file names it: replacing it is a change of one file and of the
//! golden bytes. Rules that keep it safe with bytes from others: the input is capped before it is
//! decoded, the decoder has a limit of the same size, types have no collections of zero-sized
//! elements, and trailing bytes are refused except behind a newer payload version.

use bincode::config::{Configuration, Limit, standard};
use bytes::BufMut;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::{
    Enrolment, Genesis, Idempotent, Invite, Issuer, LimitedInstance, MemberId, MemberRecord,
    Observations, Operator,
};

/// Most bytes that one value may take, encoded or while it is decoded.
pub const VALUE_LEN_MAX: usize = 1024 * 1024;

/// Bytes that are no value of the expected type. Fault: whoever sent them; nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It is too long to be read or sent.
    #[error("{len} bytes are over the limit of {VALUE_LEN_MAX}")]
    TooLong {
        /// In bytes.
        len: usize,
    },
    /// It is no such value.
    #[error("cannot decode: {0}")]
    Malformed(String),
    /// Something follows it.
    #[error("{len} bytes follow the value")]
    Trailing {
        /// In bytes.
        len: usize,
    },
    /// Fault: us.
    #[error("cannot encode: {0}")]
    Encode(String),
    /// Its first byte is 0.
    #[error("payload version 0 does not exist")]
    Version,
}

fn config()
-> Configuration<bincode::config::LittleEndian, bincode::config::Varint, Limit<VALUE_LEN_MAX>> {
    standard().with_limit::<VALUE_LEN_MAX>()
}

/// Encodes `value`.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    bincode::serde::encode_to_vec(value, config()).map_err(|e| WireError::Encode(e.to_string()))
}

/// Encodes `value` into the space that `buf` has left; an error leaves part of it written.
pub fn encode_into<T: Serialize>(value: &T, buf: &mut impl BufMut) -> Result<(), WireError> {
    let bytes = encode(value)?;
    if bytes.len() > buf.remaining_mut() {
        return Err(WireError::TooLong { len: bytes.len() });
    }
    buf.put_slice(&bytes);
    Ok(())
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    match decode_prefix(bytes)? {
        (value, len) if len == bytes.len() => Ok(value),
        (_, len) => Err(WireError::Trailing { len: bytes.len() - len }),
    }
}

/// Decodes a value off the front of `bytes` and says how many bytes it took.
pub fn decode_prefix<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, usize), WireError> {
    if bytes.len() > VALUE_LEN_MAX {
        return Err(WireError::TooLong { len: bytes.len() });
    }
    bincode::serde::decode_from_slice(bytes, config())
        .map_err(|e| WireError::Malformed(e.to_string()))
}

/// A type that travels as the payload of an entry: one version byte, then its fields.
///
/// It grows by fields at its end, and only there: what is inside a field never changes shape. An
/// older reader takes the prefix that it knows, a newer one completes what an older version lacks.
pub trait Payload: Serialize + DeserializeOwned {
    /// Raised when a field is appended.
    const VERSION: u8 = 1;

    /// The fields that were appended after `version`, encoded one after the other with the values that
    /// a payload of that version is read with. To be extended together with [`Payload::VERSION`].
    fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
        let _ = version;
        Ok(Vec::new())
    }
}

impl Payload for Genesis {}
impl Payload for MemberRecord {
    const VERSION: u8 = 3;

    fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
        let (idempotent, capacities) = (Vec::<Idempotent>::new(), Vec::<LimitedInstance>::new());
        match version {
            1 => encode(&(idempotent, capacities)),
            2 => encode(&capacities),
            _ => Ok(Vec::new()),
        }
    }
}

impl Payload for Enrolment {
    const VERSION: u8 = 3;

    fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
        let (replaces, let_in_by) = (Vec::<MemberId>::new(), None::<MemberId>);
        match version {
            1 => encode(&(replaces, let_in_by)),
            2 => encode(&let_in_by),
            _ => Ok(Vec::new()),
        }
    }
}

impl Payload for Invite {}

impl Payload for Issuer {
    const VERSION: u8 = 3;

    fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
        let (kept, dropped) = (Vec::<MemberId>::new(), Vec::<MemberId>::new());
        match version {
            1 => encode(&(kept, dropped)),
            2 => encode(&dropped),
            _ => Ok(Vec::new()),
        }
    }
}

impl Payload for Operator {}
impl Payload for Observations {
    const VERSION: u8 = 2;

    fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
        let signed_at_ms = None::<u64>;
        match version {
            1 => encode(&signed_at_ms),
            _ => Ok(Vec::new()),
        }
    }
}

/// Encodes a payload behind its version.
pub fn encode_payload<T: Payload>(value: &T) -> Result<Vec<u8>, WireError> {
    encode(&(T::VERSION, value))
}

/// Decodes a payload. One of a newer version is read as far as this version knows it; what one of an
/// older version lacks has its default.
pub fn decode_payload<T: Payload>(bytes: &[u8]) -> Result<T, WireError> {
    match bytes.first() {
        Some(0) => Err(WireError::Version),
        Some(version) if *version < T::VERSION => {
            let completed = [bytes, &T::appended_after(*version)?].concat();
            decode::<(u8, T)>(&completed).map(|(_, value)| value)
        }
        Some(version) if *version > T::VERSION => {
            decode_prefix::<(u8, T)>(bytes).map(|((_, value), _)| value)
        }
        _ => decode::<(u8, T)>(bytes).map(|(_, value)| value),
    }
}

/// What released versions said, byte for byte.
#[cfg(test)]
pub(crate) mod golden {
    use std::fmt::Debug;

    use super::{decode, encode};
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    /// Of each version what it added: a name and its bytes as hex in each line. Lines are never edited.
    const WIRE: [&str; 5] = [
        include_str!("../tests/golden/wire-1.txt"),
        include_str!("../tests/golden/wire-2.txt"),
        include_str!("../tests/golden/wire-3.txt"),
        include_str!("../tests/golden/wire-4.txt"),
        include_str!("../tests/golden/wire-5.txt"),
    ];

    /// Fails unless this version reads the golden bytes of `name` as `value`, and writes them back.
    #[track_caller]
    pub(crate) fn check<T: PartialEq + Debug>(
        name: &str,
        value: &T,
        write: impl Fn(&T) -> Vec<u8>,
        read: impl Fn(&[u8]) -> T,
    ) {
        let written = hex(&write(value));
        let Some(golden) = find(name) else {
            panic!("no golden bytes of that name; they would be\n{name} {written}");
        };
        assert_eq!(written, golden, "{name} is written otherwise than it was");
        assert_eq!(read(&bytes(golden)), *value, "{name} is not understood");
    }

    /// Fails unless this version reads the golden bytes of `name` as `value`; it writes more.
    #[track_caller]
    pub(crate) fn check_older<T: PartialEq + Debug>(
        name: &str,
        value: &T,
        read: impl Fn(&[u8]) -> T,
    ) {
        let Some(golden) = find(name) else { panic!("no golden bytes of {name}") };
        assert_eq!(read(&bytes(golden)), *value, "{name} is not understood");
    }

    fn find(name: &str) -> Option<&'static str> {
        let lines = WIRE.iter().flat_map(|wire| wire.lines());
        lines.filter_map(|line| line.split_once(' ')).find(|(of, _)| *of == name).map(|(_, is)| is)
    }

    /// [`check`] for what is encoded as it is.
    #[track_caller]
    pub(crate) fn check_value<T>(name: &str, value: &T)
    where
        T: PartialEq + Debug + Serialize + DeserializeOwned,
    {
        check(name, value, |value| encode(value).unwrap(), |bytes| decode(bytes).unwrap());
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let pairs = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        InstanceRecord, InstanceState, MemberId, MemberPhase, ObservedWindow, Protocol, PublicKey,
        Unlisted, Weight,
    };

    fn record() -> MemberRecord {
        MemberRecord {
            name: "node-a".parse().unwrap(),
            address: "127.0.0.1:7370".parse().unwrap(),
            zone: "eu1/a".into(),
            phase: MemberPhase::Running,
            instances: vec![InstanceRecord {
                id: "web".parse().unwrap(),
                service: "web".parse().unwrap(),
                protocol: Protocol::Tcp,
                port: 8080,
                tags: vec!["v2".into()],
                weight: Weight(100),
                state: InstanceState::Ready,
            }],
            agent_version: "0.1.0".into(),
            idempotent: Vec::new(),
            capacities: Vec::new(),
        }
    }

    #[test]
    fn record_bytes_are_frozen() {
        let golden =
            b"\x03\x06node-a\x00\x7f\x00\x00\x01\xfb\xca\x1c\x05eu1/a\x00\x01\x03web\x03web\
                       \x00\xfb\x90\x1f\x01\x02v2\x64\x00\x050.1.0\x00\x00";
        assert_eq!(encode_payload(&record()).unwrap(), golden);
    }

    #[test]
    fn payloads_are_read_and_written_as_ever() {
        fn check<T: Payload + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
            let write = |value: &T| encode_payload(value).unwrap();
            golden::check(name, value, write, |bytes| decode_payload(bytes).unwrap());
        }
        fn check_older<T: Payload + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
            golden::check_older(name, value, |bytes| decode_payload(bytes).unwrap());
        }
        let (key, id) = (PublicKey([7; 32]), MemberId::from_bytes([9; 16]));
        let genesis = Genesis {
            root: key,
            root_certificate: vec![0x30, 0x03, 1, 2, 3],
            created_at: 1_790_000_000,
            unlisted: Unlisted::Deny,
            leaf_ttl_secs: 604_800,
            nonce: [5; 16],
        };
        check("payload/genesis", &genesis);
        let window = ObservedWindow {
            member: id,
            instance: "web".parse().unwrap(),
            samples: 300,
            failures: 7,
            first_failure_age_ms: Some(1_500),
            last_failure_age_ms: Some(20),
            last_success_age_ms: None,
        };
        let observations = Observations {
            calls: vec!["web".parse().unwrap()],
            called: 10,
            accused: 1,
            windows: vec![window],
            signed_at_ms: None,
        };
        check_older("payload/observations", &observations);
        let signed = Observations { signed_at_ms: Some(1_790_000_000_123), ..observations };
        check("payload/observations/2", &signed);
        check_older("payload/record", &record());
        let idempotent = Idempotent {
            instance: "web".parse().unwrap(),
            requests: vec!["GET *".parse().unwrap()],
        };
        let record_2 = MemberRecord { idempotent: vec![idempotent], ..record() };
        check_older("payload/record/2", &record_2);
        let limited =
            LimitedInstance { instance: "web".parse().unwrap(), soft: Some(200), hard: None };
        check("payload/record/3", &MemberRecord { capacities: vec![limited], ..record_2 });
        for (phase, state) in [
            (MemberPhase::Draining, InstanceState::Draining),
            (MemberPhase::Restarting, InstanceState::Failing),
            (MemberPhase::Left, InstanceState::Maint),
        ] {
            let mut record = record();
            record.phase = phase;
            record.address = "[2001:db8::1]:7370".parse().unwrap();
            record.instances[0].state = state;
            check_older(&format!("payload/record/{state:?}"), &record);
        }
        let enrolment = Enrolment {
            key,
            name: "node-a".parse().unwrap(),
            serial: 300,
            services: Some(vec!["web".parse().unwrap()]),
            issued_at: 1_790_000_000,
            invite: Some(id),
            replaces: Vec::new(),
            let_in_by: None,
        };
        let open = Enrolment { services: None, invite: None, ..enrolment.clone() };
        check_older("payload/enrolment", &enrolment);
        check_older("payload/enrolment/open", &open);
        check_older("payload/enrolment/2", &open);
        let replacing = Enrolment { replaces: vec![id], ..enrolment };
        check_older("payload/enrolment/2/replacing", &replacing);
        check("payload/enrolment/3", &Enrolment { let_in_by: Some(id), ..replacing });
        let invite = Invite {
            key,
            expires_at: 1_790_003_600,
            uses: 3,
            name: Some("node-b".parse().unwrap()),
            services: Some(vec!["db".parse().unwrap(), "web".parse().unwrap()]),
        };
        check("payload/invite", &invite);
        let certificate = vec![0x30, 0x01, 0xff];
        let (kept, dropped) = (Vec::new(), Vec::new());
        let issuer = Issuer { key, member: id, certificate, is_active: true, kept, dropped };
        check_older("payload/issuer", &issuer);
        let dismissed = Issuer { is_active: false, kept: vec![id], ..issuer };
        check_older("payload/issuer/2", &dismissed);
        let other = MemberId::from_bytes([8; 16]);
        check("payload/issuer/3", &Issuer { dropped: vec![other], ..dismissed });
        let operator = Operator { key, name: "ada".to_owned(), is_active: false };
        check("payload/operator", &operator);
    }

    #[test]
    fn older_reader_reads_the_prefix_of_a_newer_payload() {
        let mut bytes = encode_payload(&record()).unwrap();
        bytes.push(42);
        let trailing = WireError::Trailing { len: 1 };
        assert_eq!(decode_payload::<MemberRecord>(&bytes).unwrap_err(), trailing);
        bytes[0] = MemberRecord::VERSION + 1;
        assert_eq!(decode_payload::<MemberRecord>(&bytes).unwrap(), record());
    }

    /// The first version of a payload, and what became of it.
    #[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
    struct First {
        name: String,
    }

    #[derive(Clone, Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Third {
        name: String,
        zone: String, // since version 2
        weight: u8,   // since version 3
    }

    impl Payload for First {}

    impl Payload for Third {
        const VERSION: u8 = 3;

        fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
            match version {
                1 => encode(&("nowhere", 100_u8)),
                2 => encode(&100_u8),
                _ => Ok(Vec::new()),
            }
        }
    }

    #[test]
    fn payload_that_grew_is_read_by_older_readers_and_reads_older_payloads() {
        let (name, zone) = ("a".to_owned(), "eu1".to_owned());
        let (old, new) = (First { name: name.clone() }, Third { name, zone, weight: 7 });
        let (first, third) = (encode_payload(&old).unwrap(), encode_payload(&new).unwrap());
        let second = encode(&(2_u8, "a", "eu1")).unwrap();
        assert_eq!(decode_payload::<First>(&third).unwrap(), old, "N-1 reads N");
        assert_eq!(decode_payload::<Third>(&third).unwrap(), new);
        let completed = |zone: &str| Third { zone: zone.into(), weight: 100, ..new.clone() };
        assert_eq!(decode_payload::<Third>(&second).unwrap(), completed("eu1"), "N reads N-1");
        assert_eq!(decode_payload::<Third>(&first).unwrap(), completed("nowhere"), "and N-2");
        for whole in [first, second, third] {
            for len in 0..whole.len() {
                assert!(decode_payload::<Third>(&whole[..len]).is_err(), "{len} of {whole:?}");
            }
            let longer = [&whole[..], &[0]].concat();
            assert!(decode_payload::<Third>(&longer).is_err(), "{longer:?}");
        }
    }

    #[test]
    fn every_truncation_of_a_record_is_refused() {
        let bytes = encode_payload(&record()).unwrap();
        for len in 0..bytes.len() {
            assert!(decode_payload::<MemberRecord>(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn nine_bytes_cannot_ask_for_a_gigabyte() {
        let claim = [&[0xfd][..], &(1_u64 << 40).to_le_bytes()].concat();
        assert!(matches!(decode::<String>(&claim), Err(WireError::Malformed(_))));
        assert!(matches!(decode::<Vec<u64>>(&claim), Err(WireError::Malformed(_))));
    }

    #[test]
    fn bad_names_do_not_come_in_by_the_wire() {
        let bytes = encode(&"Not A Name").unwrap();
        assert!(decode::<crate::model::ServiceName>(&bytes).is_err());
    }

    proptest::proptest! {
        #[test]
        fn junk_never_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let _ = decode_payload::<MemberRecord>(&bytes);
            let _ = decode_payload::<Enrolment>(&bytes);
            let _ = decode_payload::<Issuer>(&bytes);
            let _ = crate::model::Entry::decode(bytes.into());
        }
    }
}
