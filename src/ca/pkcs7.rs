//! Certificates as PKCS#7 carries them: SignedData that nobody has signed (RFC 5652, 5.1; RFC 8551, 3.8).

use super::der::tlv;

/// `id-signedData` and `id-data`.
const SIGNED_DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 2];
const DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 1];

const INTEGER: u8 = 0x02;
const OID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const CONTEXT_0: u8 = 0xa0;

/// These certificates, each in DER.
pub fn certs_only(certificates: &[Vec<u8>]) -> Vec<u8> {
    // In DER a set has its elements in order (X.690, 11.6), and strict readers insist on that.
    let mut sorted: Vec<&[u8]> = certificates.iter().map(Vec::as_slice).collect();
    sorted.sort_unstable();
    let signed_data = [
        tlv(INTEGER, &[1]),
        tlv(SET, &[]),
        tlv(SEQUENCE, &tlv(OID, DATA)),
        tlv(CONTEXT_0, &sorted.concat()),
        tlv(SET, &[]),
    ];
    let content = tlv(CONTEXT_0, &tlv(SEQUENCE, &signed_data.concat()));
    tlv(SEQUENCE, &[tlv(OID, SIGNED_DATA), content].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::tests::must;
    use crate::files::test_dir::TestDir;
    use crate::pem;
    use std::fs;

    #[test]
    fn openssl_reads_what_is_written_and_writes_the_same() {
        let dir = TestDir::new();
        for count in 1..=3 {
            let make = |n: usize| {
                let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key";
                must(&dir, &format!("req -x509 {key} -subj /CN=ca-{n} -out {n}.crt"));
                fs::read_to_string(dir.join(format!("{n}.crt"))).unwrap()
            };
            let mut made: Vec<(Vec<u8>, String)> = (0..count)
                .map(make)
                .map(|text| (pem::blocks(&text).unwrap().remove(0).der, text))
                .collect();
            let ders: Vec<Vec<u8>> = made.iter().map(|(der, _)| der.clone()).collect();
            let ours = certs_only(&ders);
            fs::write(dir.join("ours.p7"), &ours).unwrap();
            must(&dir, "pkcs7 -inform DER -in ours.p7 -print_certs -out printed");
            let printed = fs::read_to_string(dir.join("printed")).unwrap();
            let printed = pem::blocks(&printed).unwrap().into_iter().map(|block| block.der);
            made.sort();
            assert_eq!(
                printed.collect::<Vec<_>>(),
                made.iter().map(|m| m.0.clone()).collect::<Vec<_>>()
            );
            fs::write(dir.join("all"), made.iter().map(|m| &*m.1).collect::<String>()).unwrap();
            must(&dir, "crl2pkcs7 -nocrl -certfile all -outform DER -out theirs.p7");
            assert_eq!(ours, fs::read(dir.join("theirs.p7")).unwrap(), "{count}");
        }
    }
}
