//! Decompresses zstd streams of any number of frames.
//!
//! Source: RFC 8878 section 3.1. Layers made for lazy pulling have many frames and skippable ones between them.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

const FRAME: u32 = 0xfd2f_b528;
const SKIPPABLE: std::ops::RangeInclusive<u32> = 0x184d_2a50..=0x184d_2a5f;

/// Whether a stream that begins so is compressed with zstd.
pub(super) fn begins(magic: [u8; 4]) -> bool {
    let magic = u32::from_le_bytes(magic);
    magic == FRAME || SKIPPABLE.contains(&magic)
}

/// Reads the decompressed bytes.
pub(super) struct Decoder<R: BufRead>(State<R>);

/// The rest of a stream behind the four bytes that were read to see what comes.
type Headed<R> = io::Chain<io::Cursor<[u8; 4]>, R>;

enum State<R: BufRead> {
    /// Before a frame or at the end.
    Between(R),
    Frame(Box<StreamingDecoder<Headed<R>, FrameDecoder>>),
    /// While moving from one state to the next, and after an error.
    Broken,
}

impl<R: BufRead> Decoder<R> {
    pub(super) fn new(reader: R) -> Decoder<R> {
        Decoder(State::Between(reader))
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match std::mem::replace(&mut self.0, State::Broken) {
                State::Between(mut reader) => {
                    if reader.fill_buf()?.is_empty() {
                        self.0 = State::Between(reader);
                        return Ok(0);
                    }
                    self.0 = next_frame(reader)?;
                }
                State::Frame(mut frame) => {
                    let n = frame.read(buffer)?;
                    self.0 =
                        if n > 0 { State::Frame(frame) } else { State::Between(frame.into_inner().into_inner().1) };
                    if n > 0 {
                        return Ok(n);
                    }
                }
                State::Broken => return Err(io::Error::other("the zstd stream is damaged")),
            }
        }
    }
}

/// Skips one skippable frame or opens an ordinary one.
fn next_frame<R: BufRead>(mut reader: R) -> io::Result<State<R>> {
    let mut magic = [0u8; 4];
    reader.read_exact(&mut magic)?;
    let number = u32::from_le_bytes(magic);
    if SKIPPABLE.contains(&number) {
        let mut length = [0u8; 4];
        reader.read_exact(&mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        if io::copy(&mut (&mut reader).take(length), &mut io::sink())? < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        return Ok(State::Between(reader));
    }
    let frame = StreamingDecoder::new(io::Cursor::new(magic).chain(reader)).map_err(io::Error::other)?;
    Ok(State::Frame(Box::new(frame)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decoder::new(bytes).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn all_frames_are_read_and_skippable_ones_skipped() {
        let text = b"one layer, one layer, one layer. ".repeat(20_000);
        let (a, b) = text.split_at(300_000);
        let mut stream = compress_to_vec(a, CompressionLevel::Fastest);
        assert!(stream.len() < a.len() / 10 && begins(stream[..4].try_into().unwrap()));
        stream.extend(0x184d_2a53u32.to_le_bytes());
        stream.extend(5u32.to_le_bytes());
        stream.extend(b"notes");
        stream.extend(compress_to_vec(b, CompressionLevel::Fastest));
        assert_eq!(read(&stream).unwrap(), text);
        assert!(!begins(*b"\x1f\x8b\0\0"));
    }

    #[test]
    fn what_the_reference_program_wrote_is_read() {
        // printf 'portolan portolan portolan portolan\n' | zstd -19
        let frame = b"\x28\xb5\x2f\xfd\x04\x68\x85\x00\x00\x50\x70\x6f\x72\x74\x6f\x6c\x61\x6e\x20\x0a\x01\x00\xb4\xcb\x11\x19\x7e\x88\x16";
        assert_eq!(read(frame).unwrap(), b"portolan portolan portolan portolan\n");
    }

    #[test]
    fn a_cut_or_damaged_stream_is_an_error() {
        let whole = compress_to_vec(&b"something longer than nothing ".repeat(100)[..], CompressionLevel::Fastest);
        assert!(read(&whole[..whole.len() - 4]).is_err());
        assert!(read(&whole[..3]).is_err());
        let mut garbage = whole.clone();
        garbage.extend(b"rubbish behind the frame");
        assert!(read(&garbage).is_err());
    }
}
