//! Numbers as digits, by hand: they are written several times a request, and `fmt` shows there.

/// The digits of `number`, written at the end of `buffer`, which holds those of any.
pub fn decimal(mut number: u64, buffer: &mut [u8; 20]) -> &str {
    let mut first = buffer.len();
    for digit in buffer.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        first -= 1;
        if number == 0 {
            break;
        }
    }
    let digits = buffer.get(first..).unwrap_or_default();
    std::str::from_utf8(digits).unwrap_or_default()
}

/// Two lower-case hexadecimal digits for each byte.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    let halves = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    text.extend(halves.filter_map(|half| char::from_digit(half.into(), 16)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_by_the_standard_library() {
        for number in [0, 9, 10, 1_234_567_890, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string());
        }
        assert_eq!(hex(&[0x00, 0x9a, 0xbc, 0xff]), "009abcff");
        assert_eq!(hex(&[]), "");
    }
}
