// A client of EST by Bouncy Castle, a library that no one here wrote; .ci/check-est-clients.sh runs it. It
// asks for all four operations, first by HTTP Basic, then by the certificate that it got.
import java.security.*;
import java.security.cert.X509Certificate;
import java.security.spec.ECGenParameterSpec;
import java.util.*;
import javax.net.ssl.*;
import org.bouncycastle.asn1.x500.X500Name;
import org.bouncycastle.cert.X509CertificateHolder;
import org.bouncycastle.cert.jcajce.*;
import org.bouncycastle.est.*;
import org.bouncycastle.est.jcajce.*;
import org.bouncycastle.operator.jcajce.JcaContentSignerBuilder;
import org.bouncycastle.pkcs.*;
import org.bouncycastle.pkcs.jcajce.JcaPKCS10CertificationRequestBuilder;
import org.bouncycastle.util.Store;

/** Usage: EST_SECRET=… EstClient SERVER DEVICE, with the CA on standard input. */
class EstClient {
    static PKCS10CertificationRequest request(KeyPair key, String name) throws Exception {
        return new JcaPKCS10CertificationRequestBuilder(new X500Name("CN=" + name), key.getPublic())
            .build(new JcaContentSignerBuilder("SHA256withECDSA").build(key.getPrivate()));
    }

    static X509CertificateHolder only(Store<X509CertificateHolder> store) {
        Collection<X509CertificateHolder> all = store.getMatches(null);
        if (all.size() != 1) throw new IllegalStateException(all.size() + " certificates");
        return all.iterator().next();
    }

    public static void main(String[] args) throws Exception {
        Security.addProvider(new org.bouncycastle.jce.provider.BouncyCastleProvider());
        X509Certificate ca = (X509Certificate) java.security.cert.CertificateFactory.getInstance("X.509")
            .generateCertificate(System.in);
        var anchor = Set.of(new java.security.cert.TrustAnchor(ca, null));
        X509TrustManager[] trust = JcaJceUtils.getCertPathTrustManager(anchor, null);
        var generator = KeyPairGenerator.getInstance("EC");
        generator.initialize(new ECGenParameterSpec("secp256r1"));
        KeyPair key = generator.generateKeyPair();

        ESTService service = new JsseESTServiceBuilder(args[0], trust).build();
        var cas = only(service.getCACerts().getCertificateStore());
        System.out.println("cacerts: " + cas.getSubject());
        System.out.println("csrattrs: " + (service.getCSRAttributes().hasAttributesResponse() ? "some" : "none"));
        // It takes no user with a colon; without a user, the request says whose it is.
        var user = args[1].contains(":") ? "" : args[1];
        var auth = new HttpAuth("est", user, System.getenv("EST_SECRET").toCharArray());
        var enrolled = only(service.simpleEnroll(false, request(key, args[1]), auth).getStore());
        System.out.println("simpleenroll: " + enrolled.getSubject() + " " + enrolled.getSerialNumber());

        KeyStore store = KeyStore.getInstance("PKCS12");
        store.load(null, null);
        var own = new JcaX509CertificateConverter().getCertificate(enrolled);
        store.setKeyEntry("own", key.getPrivate(), new char[0], new X509Certificate[] { own });
        KeyManagerFactory keys = KeyManagerFactory.getInstance("SunX509");
        keys.init(store, new char[0]);
        service = new JsseESTServiceBuilder(args[0], trust).withKeyManagers(keys.getKeyManagers()).build();
        var renewed = only(service.simpleEnroll(true, request(key, args[1]), null).getStore());
        System.out.println("simplereenroll: " + renewed.getSubject() + " " + renewed.getSerialNumber());
    }
}
