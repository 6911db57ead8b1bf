//! Frames and their bytes. Pure: [`Decoder`] and [`Encoder`] hold the compression state of one direction each.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// Version in control frames; 3.1 differs from 3 in flow control only and says 3.
const VERSION: u16 = 3;
/// Larger control frames are refused; those of clients have some hundred bytes.
const MAX_CONTROL: usize = 16 * 1024;
/// Larger header blocks, once decompressed, are refused.
const MAX_HEADERS: usize = 32 * 1024;
/// A data frame is passed on in pieces of at most this size, so that its length (up to 16 MiB) need not be held.
const MAX_PIECE: usize = 32 * 1024;

const FIN: u8 = 1;
const UNIDIRECTIONAL: u8 = 2;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// Why a stream is reset (section 2.6.3).
pub(crate) const PROTOCOL_ERROR: u32 = 1;
/// The stream was refused before anything was done with it.
pub(crate) const REFUSED_STREAM: u32 = 3;

/// Names (lower case) and values of a header block. A value with several parts has them one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of a header; `name` is in lower case.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Headers {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(pairs: I) -> Headers {
        Headers(pairs.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value.to_string())).collect())
    }
}

/// What is sent. Frames that nobody here needs (SETTINGS, WINDOW_UPDATE, CREDENTIAL, unknown ones) are skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Opens a stream. `fin`: the sender sends nothing on it; `unidirectional`: nor does the receiver.
    SynStream { stream: u32, fin: bool, unidirectional: bool, headers: Headers },
    /// Accepts a stream.
    SynReply { stream: u32, fin: bool, headers: Headers },
    /// Ends a stream at once.
    RstStream { stream: u32, status: u32 },
    /// To be answered with the same frame, if its number is of the other side's kind.
    Ping { id: u32 },
    /// No more streams after `last_stream`.
    GoAway { last_stream: u32, status: u32 },
    /// Further headers of a stream.
    Headers { stream: u32, fin: bool, headers: Headers },
    /// Content; `fin` with the last of it.
    Data { stream: u32, fin: bool, data: Bytes },
}

/// What makes a connection unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("SPDY version {0} is not supported")]
    Version(u16),
    #[error("a control frame of type {kind} has {length} bytes")]
    Length { kind: u16, length: usize },
    #[error("a header block cannot be decompressed")]
    Compression,
    #[error("a header block is malformed: {0}")]
    HeaderBlock(&'static str),
    #[error("a header block has more than {MAX_HEADERS} bytes")]
    HeadersTooLong,
}

/// The frame whose content is still arriving.
#[derive(Debug)]
enum Rest {
    Data { stream: u32, fin: bool, left: usize },
    Skipped { left: usize },
}

/// Turns bytes into frames.
#[derive(Debug)]
pub(crate) struct Decoder {
    inflate: Decompress,
    rest: Option<Rest>,
}

impl Decoder {
    pub(crate) fn new() -> Decoder {
        Decoder { inflate: Decompress::new(true), rest: None }
    }

    /// Takes the next frame from the front of `input`; `None` if more bytes are needed. After an error the connection's state is
    /// unknown, and it must be closed. Holds back at most one control frame, which is small.
    pub(crate) fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        loop {
            match self.rest.take() {
                Some(Rest::Skipped { left }) => {
                    let n = left.min(input.len());
                    input.advance(n);
                    if n < left {
                        self.rest = Some(Rest::Skipped { left: left - n });
                        return Ok(None);
                    }
                }
                Some(Rest::Data { stream, fin, left }) => {
                    let n = left.min(input.len()).min(MAX_PIECE);
                    if n == 0 && left > 0 {
                        self.rest = Some(Rest::Data { stream, fin, left });
                        return Ok(None);
                    }
                    let data = input.split_to(n).freeze();
                    if n < left {
                        self.rest = Some(Rest::Data { stream, fin, left: left - n });
                    }
                    return Ok(Some(Frame::Data { stream, fin: fin && n == left, data }));
                }
                None => {}
            }
            let Some(head) = input.first_chunk::<8>() else { return Ok(None) };
            let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let flags = head[4];
            let length = (usize::from(head[5]) << 16) | (usize::from(head[6]) << 8) | usize::from(head[7]);
            if first >> 31 == 0 {
                input.advance(8);
                self.rest = Some(Rest::Data { stream: first, fin: flags & FIN != 0, left: length });
                continue;
            }
            let version = u16::from_be_bytes([head[0] & 0x7f, head[1]]);
            let kind = u16::from_be_bytes([head[2], head[3]]);
            if version != VERSION {
                return Err(FrameError::Version(version));
            }
            if !matches!(kind, SYN_STREAM | SYN_REPLY | RST_STREAM | PING | GOAWAY | HEADERS) {
                input.advance(8);
                self.rest = Some(Rest::Skipped { left: length });
                continue;
            }
            if length > MAX_CONTROL {
                return Err(FrameError::Length { kind, length });
            }
            if input.len() < 8 + length {
                return Ok(None);
            }
            input.advance(8);
            let payload = input.split_to(length).freeze();
            return self.control(kind, flags, payload).map(Some);
        }
    }

    fn control(&mut self, kind: u16, flags: u8, mut payload: Bytes) -> Result<Frame, FrameError> {
        let length = payload.len();
        let wrong = FrameError::Length { kind, length };
        // Numbers before the header block, and whether the frame must end there.
        let (least, exact) = match kind {
            SYN_STREAM => (10, false),
            SYN_REPLY | HEADERS => (4, false),
            PING => (4, true),
            _ => (8, true),
        };
        if length < least || (exact && length != least) {
            return Err(wrong);
        }
        let number = payload.get_u32();
        let stream = number & 0x7fff_ffff;
        let fin = flags & FIN != 0;
        Ok(match kind {
            SYN_STREAM => {
                // The stream it belongs to, and its priority: neither matters here.
                payload.advance(6);
                let unidirectional = flags & UNIDIRECTIONAL != 0;
                Frame::SynStream { stream, fin, unidirectional, headers: self.headers(&payload)? }
            }
            SYN_REPLY => Frame::SynReply { stream, fin, headers: self.headers(&payload)? },
            HEADERS => Frame::Headers { stream, fin, headers: self.headers(&payload)? },
            RST_STREAM => Frame::RstStream { stream, status: payload.get_u32() },
            PING => Frame::Ping { id: number },
            _ => Frame::GoAway { last_stream: stream, status: payload.get_u32() },
        })
    }

    /// Decompresses and reads a header block.
    fn headers(&mut self, mut compressed: &[u8]) -> Result<Headers, FrameError> {
        let mut block = Vec::with_capacity(1024);
        loop {
            if block.len() == block.capacity() {
                if block.len() >= MAX_HEADERS {
                    return Err(FrameError::HeadersTooLong);
                }
                block.reserve(block.len());
            }
            let before = (self.inflate.total_in(), block.len());
            let status = match self.inflate.decompress_vec(compressed, &mut block, FlushDecompress::Sync) {
                Ok(status) => Some(status),
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(DICTIONARY).map_err(|_| FrameError::Compression)?;
                    None
                }
                Err(_) => return Err(FrameError::Compression),
            };
            let taken = usize::try_from(self.inflate.total_in() - before.0).map_err(|_| FrameError::Compression)?;
            compressed = compressed.get(taken..).ok_or(FrameError::Compression)?;
            match status {
                // A session's compressed stream never ends.
                Some(Status::StreamEnd) => return Err(FrameError::Compression),
                Some(_) if compressed.is_empty() && block.len() < block.capacity() => break,
                Some(_) if taken == 0 && block.len() == before.1 && block.len() < block.capacity() => {
                    return Err(FrameError::Compression);
                }
                _ => {}
            }
        }
        parse_block(&block)
    }
}

/// Number of pairs, then each name and value after its length (section 2.6.10).
fn parse_block(mut block: &[u8]) -> Result<Headers, FrameError> {
    fn number(block: &mut &[u8]) -> Result<usize, FrameError> {
        let value = block.try_get_u32().map_err(|_| FrameError::HeaderBlock("it ends early"))?;
        usize::try_from(value).map_err(|_| FrameError::HeaderBlock("a length is too large"))
    }
    fn text<'a>(block: &mut &'a [u8]) -> Result<&'a str, FrameError> {
        let length = number(block)?;
        let (text, rest) = block.split_at_checked(length).ok_or(FrameError::HeaderBlock("it ends early"))?;
        *block = rest;
        std::str::from_utf8(text).map_err(|_| FrameError::HeaderBlock("it is not text"))
    }
    let mut headers: Vec<(String, String)> = Vec::new();
    for _ in 0..number(&mut block)? {
        let name = text(&mut block)?;
        let value = text(&mut block)?;
        if name.is_empty() {
            return Err(FrameError::HeaderBlock("a name is empty"));
        }
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(FrameError::HeaderBlock("a name is not in lower case"));
        }
        headers.extend(value.split('\0').map(|part| (name.to_string(), part.to_string())));
    }
    if !block.is_empty() {
        return Err(FrameError::HeaderBlock("it has more than it says"));
    }
    Ok(Headers(headers))
}

/// Turns frames into bytes.
#[derive(Debug)]
pub(crate) struct Encoder {
    deflate: Compress,
}

impl Encoder {
    pub(crate) fn new() -> Encoder {
        let mut deflate = Compress::new(Compression::default(), true);
        deflate.set_dictionary(DICTIONARY).expect("a new compressor takes a dictionary");
        Encoder { deflate }
    }

    /// Appends a frame to `out`. Data longer than a frame can be is sent as several.
    pub(crate) fn encode(&mut self, frame: &Frame, out: &mut BytesMut) {
        match frame {
            Frame::Data { stream, fin, data } => {
                let mut left: &[u8] = data;
                loop {
                    let (piece, rest) = left.split_at(left.len().min(0xff_ffff));
                    out.put_u32(stream & 0x7fff_ffff);
                    put_length(out, if *fin && rest.is_empty() { FIN } else { 0 }, piece.len());
                    out.put_slice(piece);
                    left = rest;
                    if left.is_empty() {
                        break;
                    }
                }
            }
            Frame::SynStream { stream, fin, unidirectional, headers } => {
                let block = self.block(headers);
                let flags = (u8::from(*fin) * FIN) | (u8::from(*unidirectional) * UNIDIRECTIONAL);
                control(out, SYN_STREAM, flags, 10 + block.len());
                out.put_u32(*stream);
                out.put_bytes(0, 6);
                out.put_slice(&block);
            }
            Frame::SynReply { stream, fin, headers } | Frame::Headers { stream, fin, headers } => {
                let kind = if matches!(frame, Frame::SynReply { .. }) { SYN_REPLY } else { HEADERS };
                let block = self.block(headers);
                control(out, kind, u8::from(*fin) * FIN, 4 + block.len());
                out.put_u32(*stream);
                out.put_slice(&block);
            }
            Frame::RstStream { stream, status } | Frame::GoAway { last_stream: stream, status } => {
                let kind = if matches!(frame, Frame::RstStream { .. }) { RST_STREAM } else { GOAWAY };
                control(out, kind, 0, 8);
                out.put_u32(*stream);
                out.put_u32(*status);
            }
            Frame::Ping { id } => {
                control(out, PING, 0, 4);
                out.put_u32(*id);
            }
        }
    }

    fn block(&mut self, headers: &Headers) -> Vec<u8> {
        // Values of one name share an entry, as the format wants each name once.
        let mut pairs: Vec<(&str, String)> = Vec::new();
        for (name, value) in &headers.0 {
            match pairs.iter_mut().find(|(n, _)| n == name) {
                Some((_, values)) => *values = format!("{values}\0{value}"),
                None => pairs.push((name, value.clone())),
            }
        }
        let length = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut plain = Vec::new();
        plain.put_u32(length(pairs.len()));
        for (name, value) in &pairs {
            for text in [*name, value.as_str()] {
                plain.put_u32(length(text.len()));
                plain.put_slice(text.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(plain.len() + 64);
        let mut left = plain.as_slice();
        loop {
            let before = self.deflate.total_in();
            self.deflate
                .compress_vec(left, &mut block, FlushCompress::Sync)
                .expect("a compressor with room to write does not fail");
            let taken = usize::try_from(self.deflate.total_in() - before).expect("no more than was given");
            left = &left[taken..];
            if left.is_empty() && block.len() < block.capacity() {
                return block;
            }
            block.reserve(256);
        }
    }
}

fn control(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    put_length(out, flags, length);
}

/// The flags and the 24 bits of a length.
fn put_length(out: &mut BytesMut, flags: u8, length: usize) {
    let length = u32::try_from(length).unwrap_or(u32::MAX).min(0xff_ffff);
    out.put_u32((u32::from(flags) << 24) | length);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().copied().collect()
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect()
    }

    fn all(decoder: &mut Decoder, input: &mut BytesMut) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.decode(input)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn every_kind() -> Vec<Frame> {
        vec![
            Frame::SynStream {
                stream: 1,
                fin: false,
                unidirectional: false,
                headers: headers(&[("streamtype", "error")]),
            },
            Frame::SynStream {
                stream: 3,
                fin: true,
                unidirectional: true,
                headers: headers(&[("port", "80"), ("streamtype", "data")]),
            },
            Frame::SynReply { stream: 1, fin: false, headers: Headers::default() },
            Frame::Headers { stream: 1, fin: true, headers: headers(&[("a", "1"), ("a", "2"), ("b", "")]) },
            Frame::Data { stream: 1, fin: false, data: Bytes::from_static(b"hello") },
            Frame::Data { stream: 1, fin: true, data: Bytes::new() },
            Frame::RstStream { stream: 3, status: PROTOCOL_ERROR },
            Frame::Ping { id: 7 },
            Frame::GoAway { last_stream: 3, status: 0 },
        ]
    }

    #[test]
    fn the_dictionary_is_the_published_one() {
        let (a, b) = DICTIONARY.iter().fold((1u32, 0u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65521;
            (a, (b + a) % 65521)
        });
        assert_eq!((DICTIONARY.len(), (b << 16) | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn frames_come_back_as_they_were_whatever_the_pieces() {
        let mut encoder = Encoder::new();
        let mut bytes = BytesMut::new();
        for frame in every_kind() {
            encoder.encode(&frame, &mut bytes);
        }
        for size in [1, 3, 8, 17, bytes.len()] {
            let (mut decoder, mut input, mut frames) = (Decoder::new(), BytesMut::new(), Vec::new());
            for piece in bytes.chunks(size) {
                input.extend_from_slice(piece);
                frames.extend(all(&mut decoder, &mut input).unwrap());
            }
            // Data may come in pieces; what counts is its content and its end.
            let mut joined: Vec<Frame> = Vec::new();
            for frame in frames {
                match (joined.last_mut(), frame) {
                    (Some(Frame::Data { data: old, fin: false, .. }), Frame::Data { data, fin: false, .. }) => {
                        *old = [&old[..], &data[..]].concat().into();
                    }
                    (_, frame) => joined.push(frame),
                }
            }
            assert_eq!(joined, every_kind(), "pieces of {size}");
        }
    }

    #[test]
    fn blocks_of_other_compressors_are_read() {
        // Made with zlib 1.2.13 (level 6, sync flush after each block, one stream): a client's first streams.
        let mut decoder = Decoder::new();
        let rows = [
            ("78bbe3c6a7c202a62346703a2b294a4dcc851625aca9a08006000000ffff", headers(&[("streamtype", "error")])),
            ("c22e555c02cc2e00000000ffff", headers(&[("streamtype", "stdin")])),
            (
                "02255548a95d044ae14c16064092b30812c799a0b4cf6880a11554402502000000ffff",
                headers(&[("port", "80"), ("requestid", "0"), ("streamtype", "data")]),
            ),
        ];
        for (block, want) in rows {
            assert_eq!(decoder.headers(&hex(block)).unwrap(), want);
        }
    }

    #[test]
    fn what_nobody_needs_is_skipped() {
        // SETTINGS with one entry, WINDOW_UPDATE, an unknown frame of 3 bytes, then a ping.
        let bytes = hex("8003 0004 00 00000c 00000001 04000000 00010000 8003 0009 00 000008 00000001 00001000 \
             8003 00ff 00 000003 aabbcc 8003 0006 00 000004 00000005");
        let mut input = BytesMut::from(&bytes[..]);
        assert_eq!(all(&mut Decoder::new(), &mut input).unwrap(), [Frame::Ping { id: 5 }]);
    }

    #[test]
    fn large_data_is_passed_on_in_pieces() {
        let mut input = BytesMut::from(&hex("00000001 01 ffffff")[..]);
        let mut decoder = Decoder::new();
        let (mut seen, mut ended) = (0, false);
        for _ in 0..256 {
            input.extend_from_slice(&vec![b'x'; 65536]);
            for frame in all(&mut decoder, &mut input).unwrap() {
                if let Frame::Data { stream: 1, fin, data } = frame {
                    assert!(data.len() <= MAX_PIECE && !ended);
                    seen += data.len();
                    ended = fin;
                } else {
                    // The one byte that was too much is a beginning of the next frame.
                    unreachable!("{frame:?}");
                }
            }
        }
        assert_eq!((seen, ended, input.len()), (0xff_ffff, true, 1));
    }

    #[test]
    fn malformed_frames_are_refused() {
        let bomb = {
            // Compresses to a few hundred bytes.
            let value = "x".repeat(2 * MAX_HEADERS);
            let mut bytes = BytesMut::new();
            let frame = Frame::Headers { stream: 1, fin: false, headers: headers(&[("a", &value)]) };
            Encoder::new().encode(&frame, &mut bytes);
            assert!(bytes.len() < 1000, "{}", bytes.len());
            bytes.to_vec()
        };
        let length = |kind, length| FrameError::Length { kind, length };
        let rows = [
            ("version 2", hex("8002 0006 00 000004 00000001"), FrameError::Version(2)),
            ("short ping", hex("8003 0006 00 000003 000001"), length(PING, 3)),
            ("long reset", hex("8003 0003 00 000009 000000010000000101"), length(RST_STREAM, 9)),
            ("stream without numbers", hex("8003 0001 00 000004 00000001"), length(SYN_STREAM, 4)),
            ("endless headers", hex("8003 0008 00 ffffff"), length(HEADERS, 0xff_ffff)),
            ("no compression", hex("8003 0008 00 000008 00000001 00000000"), FrameError::Compression),
            ("bomb", bomb, FrameError::HeadersTooLong),
        ];
        for (what, bytes, want) in rows {
            let mut input = BytesMut::from(&bytes[..]);
            assert_eq!(all(&mut Decoder::new(), &mut input).unwrap_err(), want, "{what}");
        }
        let blocks = [
            ("", "it ends early"),
            ("00000001", "it ends early"),
            ("ffffffff 00000001 61 00000000", "it ends early"),
            ("00000001 ffffffff 61", "it ends early"),
            ("00000001 00000000 00000000", "a name is empty"),
            ("00000001 00000001 41 00000000", "a name is not in lower case"),
            ("00000001 00000001 ff 00000000", "it is not text"),
            ("00000000 00", "it has more than it says"),
        ];
        for (block, want) in blocks {
            assert_eq!(parse_block(&hex(block)), Err(FrameError::HeaderBlock(want)), "{block}");
        }
    }

    /// Many wrong inputs, made from right ones: an error or a wait for more, with little memory, never a panic or a spin.
    #[test]
    fn hostile_input_is_survived() {
        let mut encoder = Encoder::new();
        let mut valid = BytesMut::new();
        for frame in every_kind() {
            encoder.encode(&frame, &mut valid);
        }
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % u64::try_from(below).unwrap()).unwrap()
        };
        for round in 0..20_000 {
            let mut bytes = valid.to_vec();
            match round % 4 {
                0 => bytes.truncate(random(bytes.len())),
                1 => bytes = (0..random(300)).map(|_| u8::try_from(random(256)).unwrap()).collect(),
                2 => {
                    let at = random(bytes.len());
                    bytes.drain(..at);
                }
                _ => {}
            }
            for _ in 0..random(6) {
                if !bytes.is_empty() {
                    let at = random(bytes.len());
                    bytes[at] = u8::try_from(random(256)).unwrap();
                }
            }
            let (mut decoder, mut input) = (Decoder::new(), BytesMut::new());
            let mut count = 0;
            for piece in bytes.chunks(1 + random(64)) {
                input.extend_from_slice(piece);
                match all(&mut decoder, &mut input) {
                    Ok(frames) => count += frames.len(),
                    Err(_) => break,
                }
                assert!(input.len() < 8 + MAX_CONTROL + 64);
            }
            assert!(count <= bytes.len());
        }
    }
}
