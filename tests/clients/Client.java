// Plain Java without any SDK: sockets of both families (AF_INET6, the JVM's default), and the IMDSv2 exchange by hand.
// It asks anew each time and keeps only the session token. When to ask and what to print is in README.md.

import java.io.IOException;
import java.net.HttpURLConnection;
import java.net.URI;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

public class Client {
    private static final String SERVICE = "http://169.254.169.254/latest/";
    private static final String ROLES = SERVICE + "meta-data/iam/security-credentials/";

    private String token;

    private static HttpURLConnection open(String method, String url) throws IOException {
        HttpURLConnection connection = (HttpURLConnection) URI.create(url).toURL().openConnection();
        connection.setConnectTimeout(1000);
        connection.setReadTimeout(5000);
        connection.setRequestMethod(method);
        return connection;
    }

    private static String body(HttpURLConnection connection) throws IOException {
        if (connection.getResponseCode() != 200) {
            throw new IOException("status " + connection.getResponseCode() + " for " + connection.getURL());
        }
        return new String(connection.getInputStream().readAllBytes());
    }

    private String get(String url) throws IOException {
        for (boolean again = token != null; ; again = false) {
            if (token == null) {
                HttpURLConnection put = open("PUT", SERVICE + "api/token");
                put.setRequestProperty("X-aws-ec2-metadata-token-ttl-seconds", "21600");
                token = body(put);
            }
            HttpURLConnection connection = open("GET", url);
            connection.setRequestProperty("X-aws-ec2-metadata-token", token);
            if (!again || connection.getResponseCode() != 401) {
                return body(connection);
            }
            token = null;
        }
    }

    private String load() throws IOException {
        String document = get(ROLES + get(ROLES));
        Matcher found = Pattern.compile("\"AccessKeyId\" : \"(\\w+)\"").matcher(document);
        if (!found.find()) {
            throw new IOException("no access key in the document");
        }
        return found.group(1);
    }

    public static void main(String[] arguments) throws InterruptedException {
        System.out.println("version " + System.getProperty("java.version"));
        boolean watch = arguments[0].equals("watch");
        int left = watch ? Integer.MAX_VALUE : Integer.parseInt(arguments[0]);
        Client client = new Client();
        String last = null;
        for (; left > 0; left--) {
            try {
                long begin = System.nanoTime();
                String key = client.load();
                double took = (System.nanoTime() - begin) / 1e6;
                if (!watch || !key.equals(last)) {
                    System.out.printf("key %s %.1f%n", key, took);
                }
                last = key;
            } catch (IOException error) {
                System.out.println("error " + error.toString().replaceAll("\\s+", " "));
            }
            if (watch) {
                Thread.sleep(300);
            } else {
                client = new Client();
            }
        }
    }
}
